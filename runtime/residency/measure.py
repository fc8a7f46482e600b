"""`residency="auto"`: let every place feed the engine for a moment, and take the cheapest that can.

What is measured are the stages of real batches: random records of the store, through the engine,
on the device. Stages overlap, so the slowest one decides how many pairs a second a place allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...engines.contract import Engine
from ...errors import EngineError
from ...machine import available_memory_bytes
from ..device.protocol import Device
from ..lane import Lane
from ..pipeline import Pipeline, Request, Scored
from ..results import Residency
from ..store import TokenStore
from ..text import TokenizedQueries
from ..token_source import HeldTokens, TokenSource, tokens_for
from .plan import PoolPlan
from .token_pool import TokenPool, record_bytes

Int64 = npt.NDArray[np.int64]

NUM_ROUNDS = 3
# A CPU engine takes tens of milliseconds a pair at full size: opening must not take long.
MAX_PAIRS_ON_HOST = 16
# What a place gains must be worth its memory.
LEAST_GAIN = 0.05
SHARE_OF_HOST_MEMORY = 0.5
ORDER = ("disk", "host", "device")  # the cheapest first


@dataclass(frozen=True, slots=True)
class Trial:
    """What the places are tried with.

    Attributes:
        queries: one query.
        plan: what a pool would hold; None where there cannot be one, and `no_pool` says why.
        may_load: whether the store may be loaded into this machine's memory instead.
    """

    engine: Engine
    store: TokenStore
    device: Device
    lane: Lane
    queries: TokenizedQueries
    plan: PoolPlan | None
    no_pool: str
    may_load: bool

    def run(self) -> Residency:
        """Measure all places and choose one; `place` may be `host` where the store is not yet.

        Raises:
            EngineError, StoreError: the engine, the device or the store failed.
        """
        here = "host" if self.store.access == "resident" else "disk"
        if not len(self.store):
            return Residency(here, "all", 0, 0, "the store is empty", {})
        speeds, left_out = self._measured(here)
        place = choose(speeds)
        reason = _reason(place, speeds, left_out)
        if place == "device" and self.plan is not None:
            return replace(self.plan.residency(reason), pairs_per_s=speeds)
        return place_of(self.store, place, reason, speeds)

    def _measured(self, here: str) -> tuple[dict[str, float], dict[str, str]]:
        """Return pairs/s by place, and why other places were left out."""
        rows, source = self._sample(), tokens_for(self.engine, self.store)
        stages: dict[str, Stages] = {}
        left_out = {} if self.plan else {"device": self.no_pool}
        with closing(self.device.sibling()) as scratch:  # what the trial makes is freed with it
            makers = {
                "host": lambda: self._pipeline(scratch, self._held(source, rows)),
                "device": lambda: self._pooled(scratch, source, rows),
                here: lambda: self._pipeline(scratch, source),
            }
            for name in self._places(here, left_out):
                try:
                    stages[name] = self._stages(makers[name](), rows)
                except EngineError as error:
                    if name == here:
                        raise
                    left_out[name] = error.message
        speeds = speeds_of(stages, len(rows[0]))
        if "device" in speeds and self.plan is not None:
            held = min(1.0, self.plan.capacity / self.plan.num_images)
            speeds["device"] = 1 / (held / speeds["device"] + (1 - held) / speeds[here])
        return {name: round(speed, 1) for name, speed in speeds.items()}, left_out

    def _places(self, here: str, left_out: dict[str, str]) -> list[str]:
        places = [here]
        if here == "disk" and self.may_load:
            need = len(self.store) * record_bytes(self.store.record_shape, self.store.layout.dtype)
            if need <= SHARE_OF_HOST_MEMORY * available_memory_bytes():
                places.append("host")
            else:
                left_out["host"] = f"{need:,} bytes are over half of the free memory"
        if self.plan is not None:
            places.append("device")
        return places

    @property
    def _shape(self) -> tuple[int, int]:
        sizes = self.engine.manifest.bundle.sizes
        return sizes.num_tokens, sizes.hidden

    def _sample(self) -> list[Int64]:
        """Return random rows for a warm-up and every round."""
        rows, most = self.store.live_rows(), self.engine.manifest.profile.max_pairs
        size = min(most, MAX_PAIRS_ON_HOST) if self.device.shares_memory else most
        random = np.random.default_rng(0)
        return [random.choice(rows, size) for _ in range(1 + NUM_ROUNDS)]

    def _pipeline(
        self, device: Device, source: TokenSource, pool: TokenPool | None = None
    ) -> Pipeline:
        # A graph would stay with the engine, and its capture count as compute.
        lane = self.lane
        return Pipeline(
            self.engine, source, device, num_slots=1, lane=lane, pool=pool, graphs=False
        )

    def _held(self, source: TokenSource, rows: list[Int64]) -> HeldTokens:
        every = np.unique(np.concatenate(rows))
        return HeldTokens.read_from(source, every, self._shape, self.engine.manifest.token_dtype)

    def _pooled(self, device: Device, source: TokenSource, rows: list[Int64]) -> Pipeline:
        every, dtype = np.unique(np.concatenate(rows)), self.engine.manifest.token_dtype
        pool = TokenPool(
            device, every, len(every), shape=self._shape, dtype=dtype, checks_finite=False
        )
        pipeline = self._pipeline(device, source, pool)
        pipeline.load(every)
        return pipeline

    def _stages(self, pipeline: Pipeline, rows: list[Int64]) -> Stages:
        """Return what the stages of a batch took; the first run only warms up."""
        asked = np.zeros(len(rows[0]), np.int64)
        done: list[Scored] = [pipeline.run(Request(self.queries, asked, some)) for some in rows]
        return Stages(
            median(run.gather_ms for run in done[1:]),
            median(max(run.upload_ms, run.download_ms) for run in done[1:]),
            min(run.compute_ms for run in done[1:]),
        )


class Stages(NamedTuple):
    """Milliseconds of a batch: gather and copies as they usually are, compute undisturbed."""

    gather: float
    copy: float
    compute: float


def speeds_of(stages: Mapping[str, Stages], num_pairs: int) -> dict[str, float]:
    """Return the pairs/s that the slowest stage of each place allows.

    Disk and host compute the same, so the less disturbed of them counts for both.
    """
    plain = min(found.compute for name, found in stages.items() if name != "device")
    slowest = {
        name: max(found.gather, found.copy, found.compute if name == "device" else plain)
        for name, found in stages.items()
    }
    return {name: num_pairs / max(taken, 1e-6) * 1e3 for name, taken in slowest.items()}


def choose(pairs_per_s: Mapping[str, float]) -> Any:
    """Return the cheapest place that is as fast as the fastest, within `LEAST_GAIN`."""
    enough = max(pairs_per_s.values()) * (1 - LEAST_GAIN)
    return next(name for name in ORDER if pairs_per_s.get(name, 0.0) >= enough)


def place_of(
    store: TokenStore, place: Any, reason: str, pairs_per_s: Mapping[str, float]
) -> Residency:
    """Return the residency of a store that is read from disk, or held in this machine's memory."""
    each = record_bytes(store.record_shape, store.layout.dtype)
    num_images = len(store) if place == "host" else 0
    return Residency(place, "all", num_images, num_images * each, reason, pairs_per_s)


def _reason(place: str, pairs_per_s: Mapping[str, float], left_out: Mapping[str, str]) -> str:
    figures = ", ".join(f"{name} {pairs_per_s[name]:,.0f}" for name in ORDER if name in pairs_per_s)
    others = "".join(f"; not {name}: {why}" for name, why in left_out.items())
    return f"measured pairs/s: {figures}; {place} is the cheapest that keeps up{others}"
