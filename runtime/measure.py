"""Where tokens are read from, decided: as asked, or by measuring what keeps up with the engine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Int64
from ..engines.contract import Engine
from ..errors import EngineError, RequestError
from ..kernels.device.contract import Device
from ..machine import available_memory_bytes
from .pipeline import NUM_SLOTS, Pipeline, Request, Scored
from .pool import TokenPool, pool_capability, record_bytes
from .residency import PoolPlan, ResidencyOptions, plan_pool
from .results import Residency
from .source import HeldTokens, TokenSource, tokens_for
from .store import TokenStore
from .streams import Lane
from .text import TokenizedQueries

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


class Decision(NamedTuple):
    """Where tokens are read from; `plan` says what is held where that is the device."""

    residency: Residency
    plan: PoolPlan | None = None


def decide(
    wish: ResidencyOptions,
    engine: Engine,
    store: TokenStore,
    device: Device,
    lane: Lane,
    *,
    queries: TokenizedQueries,
    num_pipelines: int,
    may_load: bool,
) -> Decision:
    """Decide where the tokens of `store` are read from; `auto` measures.

    Args:
        queries: one query to measure with.
        num_pipelines: how many will share the device.
        may_load: whether the store may be opened again with its records in memory: the decision
            is then `host` although this store is not.

    Raises:
        RequestError: a wish that cannot be granted.
        EngineError, StoreError: measuring failed.
    """
    here = "host" if store.access == "resident" else "disk"
    if wish.place is None or wish.place == here:
        why = "the store was opened so" if wish.place is None else "as asked"
        return Decision(place_of(store, here, why, {}))
    if wish.place == "host" and may_load:
        return Decision(place_of(store, "host", "as asked", {}))
    if wish.place in ("disk", "host"):
        access = "resident" if wish.place == "host" else "cached"
        raise RequestError(
            f'residency is "{wish.place}", but the open store reads from {here}',
            hint=f'open it with TokenStore.open(path, access="{access}"), or give its path',
        )
    plan, no_pool = None, ""
    try:
        plan = _plan(wish, engine, store, device, num_pipelines)
    except EngineError as error:  # no memory of its own
        if wish.place == "device":
            raise
        no_pool = error.message
    if plan is not None and wish.place == "device":
        return Decision(plan.residency("as asked"), plan)
    residency = Trial(engine, store, device, lane, queries, plan, no_pool, may_load).run()
    return Decision(residency, plan if residency.place == "device" else None)


def _plan(
    wish: ResidencyOptions, engine: Engine, store: TokenStore, device: Device, num_pipelines: int
) -> PoolPlan:
    """Plan the pool beside what the slots will take: fresh records, and the engine's input."""
    pool_capability(device)
    manifest = engine.manifest
    sizes = manifest.bundle.sizes
    shape, dtype = (sizes.num_tokens, sizes.hidden), manifest.token_dtype
    of_a_slot = 2 * manifest.profile.max_pairs * record_bytes(shape, dtype)
    spare = num_pipelines * NUM_SLOTS * of_a_slot
    return plan_pool(store, wish, device, shape=shape, dtype=dtype, spare=spare)
