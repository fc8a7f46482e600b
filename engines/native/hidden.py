"""Hidden states that outlive their batch: a shallow engine keeps them, the whole model goes on.

    shallow engine    its forward, then rows of `hidden` -> the pairs' places in the caller's memory
    whole model       the pairs' places -> rows of `hidden`, then the layers that are left

The scores are the bits that a whole forward gives: so both must run the same kernels over the same
weights up to there, which `why_not_resume` makes sure of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np
import xxhash

from ...arrays import Array, DeviceArray
from ...bundle import QKV, SHALLOW
from ...kernels.device.contract import Stream
from ...kernels.launch import KernelLibrary
from ...kernels.records import GatherTokens, ScatterTokens
from ..contract import Batch
from .plan import STEPS8, Plan
from .steps import Choices

_COPIED_AS = np.dtype(np.float16)  # two bytes, whatever they mean
# What hidden states depend on, beside weights and tiles.
_SAME = (
    "hidden",
    "intermediate",
    "num_heads",
    "num_tokens",
    "sep_id",
    "activation",
    "element",
    "token_dtype",
    "text_buckets",
)


class Model(NamedTuple):
    """What decides an engine's bits on one GPU.

    Attributes:
        choices: tiles of its products, and what runs in one kernel.
        digests: a hash of each weight, by name.
    """

    plan: Plan
    choices: Choices
    digests: Mapping[str, bytes]


def digests_of(weights: Mapping[str, Array]) -> dict[str, bytes]:
    """Return a hash of each weight's bytes."""
    return {
        name: xxhash.xxh3_128_digest(np.ascontiguousarray(array).view(np.uint8).data)
        for name, array in weights.items()
    }


def why_not_resume(first: Model, whole: Model) -> str | None:
    """Return why `whole` cannot go on after the layers of `first`, None where it can."""
    return next(_reasons(first, whole), None)


def _reasons(first: Model, whole: Model) -> Iterator[str]:
    depth = first.plan.num_layers
    if not first.plan.shallow or whole.plan.shallow or depth >= whole.plan.num_layers:
        yield "only a whole model goes on, from an engine of its first layers"
    for name in _SAME:
        one, other = getattr(first.plan, name), getattr(whole.plan, name)
        if one != other:
            yield f"{name}: {one} and {other}"
    norms = 1 + 2 * depth
    if first.plan.epsilons[:norms] != whole.plan.epsilons[:norms]:
        yield "epsilons of the norms differ"
    # The norm before an 8-bit product is another kernel, and need not add up in the same order.
    read = [(layer, step) for layer in range(depth) for step in STEPS8] + [(depth, QKV)]
    if any(plan.is_quantized(*one) for plan in (first.plan, whole.plan) for one in read):
        yield "hidden states of 8-bit layers are not kept"
    if first.choices.tiles != whole.choices.tiles:
        yield "the products have other tiles"
    if set(first.choices.fused) != set(whole.choices.fused):
        yield "other products run in one kernel with their norm"
    others = sorted(
        name
        for name, digest in first.digests.items()
        if not name.startswith(f"{SHALLOW}.") and whole.digests.get(name) != digest
    )
    if others:
        yield f"{len(others)} weights differ, {others[0]} the first"


class Keep:
    """Copies what a shallow engine's last layer left to where the caller keeps it."""

    def __init__(self, library: KernelLibrary):
        self._scatter = ScatterTokens(library, token_dtype="float16", place_dtype="int32")

    def enqueue(self, hidden: DeviceArray, batch: Batch, stream: Stream) -> None:
        """Copy each pair's rows to its place; a place of -1 keeps nothing."""
        states, places, rows = _arrays(hidden, batch)
        self._scatter.enqueue(rows, places, states, stream=stream)


class Resume:
    """Brings what was kept to where the layers read it."""

    def __init__(self, library: KernelLibrary):
        self._gather = GatherTokens(library, token_dtype="float16", row_dtype="int32")

    def enqueue(self, hidden: DeviceArray, batch: Batch, stream: Stream) -> None:
        """Copy each pair's rows from its place."""
        states, places, rows = _arrays(hidden, batch)
        self._gather.enqueue(states, places, rows, stream=stream)


def _arrays(hidden: DeviceArray, batch: Batch) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
    """Return what is kept [N, S, W], the places [P], and the batch's own rows as [P, S, W]."""
    assert batch.hidden is not None
    states, places = cast("tuple[DeviceArray, DeviceArray]", batch.hidden)
    shape = len(batch), *states.shape[1:]
    return states, places, replace(hidden, shape=shape, dtype=_COPIED_AS)
