"""Pack a finished training run into `demo/model`.

Measures the test scores by the training code itself (float32 PyTorch, tokens in float16), so
that the card's figures do not come from the runtime they are later compared with.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ..scenes import SEEDS, groups
from ..tiny_model import CARD, DECODER, MODEL, WEIGHTS, State
from .data import GROUP, NUM_EXTRA, Captions, make_bank
from .models import Joint, Tower
from .train import first_stage_order, rerank_ranks

NUM_TEST_GROUPS = 128
NUM_CANDIDATES = 50


def official_state(tower: Tower, joint: Joint) -> State:
    """Name every trained tensor as the official checkpoint does (transformers 5 spelling)."""
    parts = {
        "vision_encoder.": tower.siglip.vision_model,
        "vision_projection.": tower.adapter,
        "clip.text_model.": tower.siglip.text_model,
        "language_model.": joint.language_model,
        "classification_head.0.dense.": joint.pooler,
        "classification_head.1.": joint.classifier,
    }
    state = {
        prefix + key: value.detach()
        for prefix, module in parts.items()
        for key, value in module.state_dict().items()
    }
    state["clip.logit_scale"] = tower.siglip.logit_scale.detach()
    state["clip.logit_bias"] = tower.siglip.logit_bias.detach()
    return state


def packed(state: Mapping[str, torch.Tensor]) -> State:
    """Drop from an official state dict what `tiny_model.official_layout` can repeat."""
    repeated = ("text_embeddings.", "clip.vision_model.", f"{DECODER}.")
    return {k: v.contiguous() for k, v in state.items() if not k.startswith(repeated)}


def _recalls(ranks: np.ndarray[Any, Any]) -> dict[str, float]:
    return {f"R@{k}": round(100 * float((ranks < k).mean()), 2) for k in (1, 5, 10, 50)}


def test_scores(tower: Tower, joint: Joint, num_groups: int) -> dict[str, Any]:
    """Recall on the test scenes, before and after reranking, and apart for unseen captions."""
    test = make_bank(SEEDS["test"], NUM_TEST_GROUPS, num_extra=0, supersample=2)
    training = itertools.islice(groups(SEEDS["train"], num_extra=NUM_EXTRA), num_groups)
    seen = {scene.caption for group in training for scene in group}
    order = first_stage_order(tower, test)
    queries = np.arange(len(order))
    before = (order == queries[:, None]).argmax(1)
    captions, tokens = Captions(test.captions), tower.tokens(test.pixels)
    after = rerank_ranks(joint, captions, tokens, order, queries, NUM_CANDIDATES)
    unseen = np.array([caption not in seen for caption in test.captions])
    return {
        "queries": len(queries),
        "candidates": NUM_CANDIDATES,
        "first_stage": _recalls(before),
        "reranked": _recalls(after),
        "captions_not_in_training": int(unseen.sum()),
        "reranked_captions_not_in_training": _recalls(after[unseen]),
    }


def pack(work: Path) -> None:
    """Write the weights and the card's figures of the run in the folder `work`."""
    tower, joint = Tower(), Joint()
    runs = {}
    for name, model in (("tower", tower), ("joint", joint), ("places", joint)):
        state = torch.load(work / f"{name}.pt", weights_only=True)
        model.load_state_dict(state["model"])  # the last stage's weights stay
        model.eval().requires_grad_(False)
        runs[name] = {"steps": state["step"], "seconds": round(state["seconds"])}
    settings = json.loads((work / "settings.json").read_text())
    state = packed(official_state(tower, joint))
    MODEL.mkdir(exist_ok=True)
    save_file(state, MODEL / WEIGHTS)
    figures = {
        "parameters": sum(value.numel() for value in state.values()),
        "seeds": SEEDS,
        "training_groups": int(settings["groups"]),
        "training_scenes": int(settings["groups"]) * GROUP,
        "stages": runs,
        "test": test_scores(tower, joint, int(settings["groups"])),
    }
    (MODEL / CARD).write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
