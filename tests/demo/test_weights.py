"""The shipped weights: small, whole, and laid out as the official training script saves them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM, SiglipModel

from edje.demo import tiny_model
from edje.demo.training.pack import packed
from edje.errors import CheckpointError


def test_all_weights_together_are_at_most_12_mb() -> None:
    files = [path for path in tiny_model.MODEL.iterdir() if path.suffix == ".safetensors"]
    assert 0 < sum(path.stat().st_size for path in files) <= 12e6


def test_the_checkpoint_loads_into_the_official_modules(tmp_path: Path) -> None:
    checkpoint, *_ = tiny_model.write_checkpoint(tmp_path)
    state = torch.load(checkpoint, weights_only=True)["model"]
    language_model = BertForMaskedLM(tiny_model.bert_config())
    language_model.resize_token_embeddings(len(tiny_model.vocabulary()) + 1, mean_resizing=False)
    clip = SiglipModel(tiny_model.siglip_config())
    for module, prefix in ((language_model, "language_model."), (clip, "clip.")):
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        assert part.keys() == module.state_dict().keys()
        module.load_state_dict(part)  # raises where a shape differs


def test_packing_is_lossless_and_repeated_tensors_are_equal() -> None:
    state = tiny_model.official_layout(tiny_model.load())
    assert packed(state).keys() == tiny_model.load().keys()
    decoder = state["language_model.cls.predictions.decoder.weight"]
    assert torch.equal(state["text_embeddings.weight"], decoder)
    vision = [key for key in state if key.startswith("vision_encoder.")]
    assert vision
    for key in vision:
        assert torch.equal(state[key], state[key.replace("vision_encoder.", "clip.vision_model.")])


def test_the_adapter_compresses_to_64_tokens() -> None:
    state = tiny_model.load()
    assert state["vision_projection.query"].shape == (1, 64, tiny_model.HIDDEN)
    num_features = tiny_model.GRID**2
    positions = next(v for k, v in state.items() if re.search(r"vision.*position_emb", k))
    assert positions.shape[0] == num_features > 64


def test_missing_weights_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_model, "MODEL", Path("/nowhere"))
    with pytest.raises(CheckpointError, match="make train"):
        tiny_model.load()


def test_the_card_tells_recipe_and_scores() -> None:
    card = json.loads((tiny_model.MODEL / tiny_model.CARD).read_text(encoding="utf-8"))
    assert card["test"]["first_stage"]["R@50"] >= 98
    assert card["test"]["reranked"]["R@1"] >= 85
    assert card["test"]["reranked"]["R@1"] >= card["test"]["first_stage"]["R@1"] + 25
    assert len(set(card["seeds"].values())) == 3
