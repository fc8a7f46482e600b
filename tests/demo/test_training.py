"""Training: the official layout of a pair, resuming, and labels that name what is false."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edje.demo import scenes
from edje.demo.training.data import GROUP, IMAGE_ID, NUM_EXTRA, Bank, Captions, make_bank
from edje.demo.training.models import Joint
from edje.demo.training.train import MatchingBatches, Run, joint_losses, schedule


@pytest.fixture(scope="module")
def bank() -> Bank:
    return make_bank(1, 12, num_extra=NUM_EXTRA, supersample=1)


CAPTIONS = ["a small red circle above a large blue star on a grey background", "a red circle"]


def test_pairs_have_the_official_layout() -> None:
    ids, mask = Captions(CAPTIONS).joint(np.array([0, 1]))
    for row, words in zip(ids.tolist(), (13, 3), strict=True):
        assert row[0] == 2
        assert row[words + 1] == 3
        assert row[words + 2 : words + 66] == [IMAGE_ID] * 64
        assert row[words + 66] == 3
        assert set(row[words + 67 :]) <= {0}
    assert mask.sum(1).tolist() == [13 + 67, 3 + 67]


def test_scores_do_not_depend_on_padding() -> None:
    torch.manual_seed(0)
    joint, captions = Joint().eval(), Captions(CAPTIONS)
    tokens = torch.randn(2, 64, 128)
    together = joint.score(joint.encode(*captions.joint(np.array([0, 1])), tokens)[1])
    alone = joint.score(joint.encode(*captions.joint(np.array([1])), tokens[1:])[1])
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)


def test_false_words_are_those_that_differ(bank: Bank) -> None:
    captions = Captions(bank.captions)
    batches = MatchingBatches(bank, captions, num_queries=1)
    texts, images = np.array([0, 0, 0]), np.array([0, 1, GROUP])
    labels = batches.word_labels(texts, images, 30)
    assert labels[0][labels[0] >= 0].sum() == 0
    differ = sum(a != b for a, b in zip(captions.ids[0], captions.ids[1], strict=True))
    assert labels[1][labels[1] >= 0].sum() == differ > 0
    assert (labels[2] == -1).all()


def test_each_word_of_a_thing_is_asked_for_its_cell(bank: Bank) -> None:
    scene = next(scenes.groups(1, num_extra=NUM_EXTRA))[0]
    words = bank.captions[0].split()
    asked = {word: cell for word, cell in zip(words, bank.cells[0], strict=True) if cell >= 0}
    for thing, (row, column) in zip(scene.things, scene.cells, strict=True):
        assert asked[thing.shape] in {3 * r + c for r, c in scene.cells}
        assert 3 * row + column in bank.cells[0]
    assert {"a", "on", "background", scene.background}.isdisjoint(asked)


def test_the_second_image_turns_the_relation(bank: Bank) -> None:
    texts, images = MatchingBatches(bank, Captions(bank.captions), 2).draw(np.random.default_rng(0))
    assert (texts[::4] == images[::4]).all()
    for text, twin in zip(texts[::4], images[1::4], strict=True):
        if text % GROUP < scenes.GROUP:
            differ = set(bank.captions[text].split()) ^ set(bank.captions[twin].split())
            assert differ <= {"left", "right", "above", "below"}


def test_losses_are_finite_and_reach_every_online_weight(bank: Bank) -> None:
    torch.manual_seed(0)
    joint, captions = Joint(), Captions(bank.captions)
    tokens = np.random.default_rng(0).normal(size=(len(bank.captions), 64, 128))
    batches = MatchingBatches(bank, captions, num_queries=2)
    rng = np.random.default_rng(0)
    losses = joint_losses(joint, batches, tokens.astype(np.float16), rng, with_places=True)
    torch.stack(list(losses.values())).sum().backward()
    assert losses.keys() == {"match", "words", "masked", "places"}
    assert all(torch.isfinite(value) for value in losses.values())
    body = [p for n, p in joint.named_parameters() if "encoder.layer" in n or "pooler" in n]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in body)


def run_steps(work: Path, *, stop_at: int | None = None) -> torch.Tensor:
    """Six steps of a toy model; `stop_at` breaks off as a killed process would."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    run = Run("toy", work, model, 1e-2, 6)

    def losses(rng: np.random.Generator) -> dict[str, torch.Tensor]:
        if run.step == stop_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.normal(size=(8, 3))).float()
        return {"square": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    run.train(losses, lambda: "", every=1, evaluate_every=100)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        run_steps(broken, stop_at=3)
    assert torch.equal(run_steps(broken), run_steps(whole))


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [schedule(step, 1000) for step in range(1001)]
    assert factors[0] < factors[50] < factors[99] == 1.0
    assert factors[500] == 1.0
    assert factors[1000] == 0.0
