"""Where tokens are read from, measured: the cheapest place that keeps up with the engine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..arrays import Int64
from ..engines.contract import Engine
from ..errors import EngineError
from ..kernels.device.contract import Device
from ..machine import available_memory_bytes
from .pipeline import Pipeline, Request, Scored
from .residency import place_now, residency_of
from .results import Residency
from .source import HeldTokens, TokenSource, record_bytes, tokens_for
from .store import TokenStore
from .streams import Streams
from .text import TokenizedQueries

if TYPE_CHECKING:
    from .pool import PoolPlan, TokenPool

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
    """

    engine: Engine
    store: TokenStore
    device: Device
    streams: Streams
    queries: TokenizedQueries
    plan: PoolPlan | None
    no_pool: str

    def run(self) -> Residency:
        """Measure all places and choose one; `place` may be `host` where the store is not yet.

        Raises:
            EngineError, StoreError: the engine, the device or the store failed.
        """
        here = place_now(self.store)
        if not len(self.store):
            return residency_of(self.store, here, "the store is empty")
        speeds, left_out = self.measure(here)
        place = choose(speeds)
        reason = _reason(place, speeds, left_out)
        if place == "device" and self.plan is not None:
            return self.plan.residency(reason, speeds)
        return residency_of(self.store, place, reason, speeds)

    def measure(self, here: str) -> tuple[dict[str, float], dict[str, str]]:
        """Return pairs/s by place, and why other places were left out."""
        rows, source = self._sample(), tokens_for(self.engine, self.store)
        stages: dict[str, Stages] = {}
        left_out = {} if self.plan else {"device": self.no_pool}
        with closing(self.device.sibling()) as scratch:  # what the trial makes is freed with it
            makers = {
                "host": lambda: self._pipeline(scratch, self._held(source, rows)),
                here: lambda: self._pipeline(scratch, source),
            }
            if (plan := self.plan) is not None:
                makers["device"] = lambda: self._pooled(plan, scratch, source, rows)
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
        if here == "disk" and not self.store.writable:
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
        streams = self.streams
        return Pipeline(
            self.engine, source, device, num_slots=1, streams=streams, pool=pool, graphs=False
        )

    def _held(self, source: TokenSource, rows: list[Int64]) -> HeldTokens:
        every = np.unique(np.concatenate(rows))
        return HeldTokens.read_from(source, every, self._shape, self.engine.manifest.token_dtype)

    def _pooled(
        self, plan: PoolPlan, device: Device, source: TokenSource, rows: list[Int64]
    ) -> Pipeline:
        every = np.unique(np.concatenate(rows))
        pool = plan.make_pool(device, every, len(every), checks_finite=False)
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
    plain = min(stage.compute for name, stage in stages.items() if name != "device")
    slowest = {
        name: max(stage.gather, stage.copy, stage.compute if name == "device" else plain)
        for name, stage in stages.items()
    }
    return {name: num_pairs / max(taken, 1e-6) * 1e3 for name, taken in slowest.items()}


def choose(pairs_per_s: Mapping[str, float]) -> str:
    """Return the cheapest place that is as fast as the fastest, within `LEAST_GAIN`."""
    enough = max(pairs_per_s.values()) * (1 - LEAST_GAIN)
    return next(name for name in ORDER if pairs_per_s.get(name, 0.0) >= enough)


def _reason(place: str, pairs_per_s: Mapping[str, float], left_out: Mapping[str, str]) -> str:
    figures = ", ".join(f"{name} {pairs_per_s[name]:,.0f}" for name in ORDER if name in pairs_per_s)
    others = "".join(f"; not {name}: {why}" for name, why in left_out.items())
    return f"measured pairs/s: {figures}; {place} is the cheapest that keeps up{others}"
