"""A small model whose scores lie far apart, and everything in folders of its own."""

from contextlib import ExitStack

import pytest

from edje.perf import random_model, subjects
from edje.perf.peers import others, run

SMALL_BLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}


@pytest.fixture
def far_apart(monkeypatch, tmp_path):
    """Scores that rounding does not reorder, engines kept for this test only, a small BLIP."""
    monkeypatch.setattr(subjects, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(random_model, "WEIGHT_STD", 0.2)
    monkeypatch.setattr(others, "BLIP_VISION", SMALL_BLIP)
    monkeypatch.setattr(
        others, "BLIP_TEXT", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    )


@pytest.fixture
def opened_bench(far_apart, small_model, tmp_path):
    """Return what prepares a bench of some candidates and its questions."""
    with ExitStack() as stack:
        yield lambda candidates, lengths=(7,): run.prepared(
            small_model, tmp_path, stack, candidates, lengths, print
        )
