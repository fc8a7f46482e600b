"""The shipped weights -> a checkpoint in the official layout, with its Hugging Face folders.

`demo/model/model.safetensors` holds every tensor once. The official file holds some twice (tied
embeddings, the vision tower under `clip.`), so they are repeated here: the demo then walks the
same path as a user's own checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..errors import CheckpointError
from . import tiny_model

MODEL = Path(__file__).parent / "model"
WEIGHTS = "model.safetensors"
CARD = "card.json"
EMBEDDINGS = "language_model.bert.embeddings.word_embeddings.weight"
DECODER = "language_model.cls.predictions.decoder"

State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class CheckpointPaths:
    """What `edje export` is given: the checkpoint and the two Hugging Face folders."""

    checkpoint: Path
    language_model: Path
    vision_model: Path


def packed(state: Mapping[str, torch.Tensor]) -> State:
    """Drop from an official state dict what `official_layout` can repeat."""
    repeated = ("text_embeddings.", "clip.vision_model.", f"{DECODER}.")
    return {k: v.contiguous() for k, v in state.items() if not k.startswith(repeated)}


def official_layout(state: State) -> State:
    """Add the tensors that the official layout holds a second time."""
    vision = {
        key.replace("vision_encoder.", "clip.vision_model.", 1): value
        for key, value in state.items()
        if key.startswith("vision_encoder.")
    }
    tied = {
        "text_embeddings.weight": state[EMBEDDINGS],
        f"{DECODER}.weight": state[EMBEDDINGS],
        f"{DECODER}.bias": state["language_model.cls.predictions.bias"],
    }
    return {**state, **vision, **tied}


def load() -> State:
    """Return the shipped tensors in float32, by official name.

    Raises:
        CheckpointError: the weights are not in this installation.
    """
    path = MODEL / WEIGHTS
    if not path.exists():
        raise CheckpointError(
            f"the demo's weights are missing: {path}",
            hint="clone the repository again, or train them: make train",
        )
    return {key: value.float() for key, value in load_file(path).items()}


def card() -> dict[str, Any]:
    """Return the model card's figures (recipe, seeds, steps, scores)."""
    figures: dict[str, Any] = json.loads((MODEL / CARD).read_text(encoding="utf-8"))
    return figures


def write_checkpoint(folder: Path) -> CheckpointPaths:
    """Write `checkpoint.pth`, `language_model/` and `vision_model/` into `folder`."""
    paths = CheckpointPaths(
        folder / "checkpoint.pth", folder / "language_model", folder / "vision_model"
    )
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model.write_language_model_folder(paths.language_model)
    tiny_model.write_vision_model_folder(paths.vision_model)
    state = {"model": official_layout(load()), "epoch": 0, "global_step": 0}
    torch.save(state, paths.checkpoint)
    return paths
