"""The model in PyTorch as its users run it: the official code's way, without waste, compiled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...arrays import Float32
from ..random_model import CACHE
from ..scorers import JointEncoder, load_official
from .contest import Ask, Bench, Question, Run, SkippedError

BATCH = 32  # the official evaluation's, and where a CPU's caches hold the activations
GPU_BATCH = 1024


def joint_encoder(bench: Bench, *, trimmed: bool, dtype: str = "float32") -> JointEncoder:
    """Return the random model's encoder on the bench's device; float32 ones share their weights."""
    official: JointEncoder = bench.once("official", load_official)
    encoder = official.as_trimmed() if trimmed else official
    if dtype != "float32":
        encoder = deepcopy(encoder)
    return encoder.to(bench.device, getattr(torch, dtype))


def eager(*, trimmed: bool, dtype: str = "float32") -> Callable[[Bench], Ask]:
    """Return what opens Hugging Face's code as it stands."""
    return lambda bench: asking(bench, joint_encoder(bench, trimmed=trimmed, dtype=dtype))


def compiled(dtype: str = "float32") -> Callable[[Bench], Ask]:
    """Return what opens the trimmed encoder behind `torch.compile`, for every length anew."""

    def make(bench: Bench) -> Ask:
        reason = why_no_compiler(bench.device)
        if reason is not None:
            raise SkippedError(reason)
        # What is compiled is kept: the second run of a machine takes seconds.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
        module = joint_encoder(bench, trimmed=True, dtype=dtype)
        return asking(bench, torch.compile(module, dynamic=False))

    return make


def why_no_compiler(device: str) -> str | None:
    """Return why `torch.compile` cannot run here, None where it can."""
    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler on CPUs, and there is none: apt install g++"
    return None


def asking(bench: Bench, module: Callable[..., Tensor]) -> Ask:
    """Return what scores a question's pairs with `module`, in batches."""
    size = BATCH if bench.device == "cpu" else GPU_BATCH

    def ask(question: Question, num_pairs: int) -> Run:
        ids = torch.from_numpy(question.pairs.text_ids.astype(np.int64)).to(bench.device)
        tokens = torch.from_numpy(question.pairs.tokens[:num_pairs])

        def run() -> Float32:
            with torch.inference_mode():
                parts: list[Any] = [
                    module(ids, part.to(bench.device, non_blocking=True))
                    for part in torch.split(tokens, size)
                ]
                scores: Float32 = torch.cat(parts).cpu().numpy()
                return scores

        return run

    return ask
