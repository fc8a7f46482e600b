"""Where tokens are read from: what a caller wants, what each place allows, and what is decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

from ..arguments import Arguments, is_whole, shown
from ..arrays import Int64
from ..engines.contract import Engine
from ..errors import EngineError, RequestError
from ..kernels.device.contract import Device
from ..machine import available_memory_bytes
from .pipeline import Pipeline, Request
from .source import HeldTokens, record_bytes, tokens_for
from .store import TokenStore
from .streams import Streams
from .text import TokenizedQueries

if TYPE_CHECKING:
    from .pool import PoolPlan

Place = Literal["disk", "host", "device", "auto"]

NUM_ROUNDS = 3
# A CPU engine takes tens of milliseconds a pair at full size: opening must not take long.
MAX_PAIRS_ON_HOST = 16
# What a place gains must be worth its memory.
LEAST_GAIN = 0.05
SHARE_OF_HOST_MEMORY = 0.5
ORDER = ("disk", "host", "device")  # the cheapest first


@dataclass(frozen=True, slots=True)
class Residency:
    """Where a reranker reads its tokens from, and why.

    Attributes:
        place: `disk` (through the page cache, or past it), `host` (held in this machine's memory)
            or `device` (held in the GPU's; what is not comes from the store).
        policy: which images are held: `all`, `listed` or `recent` (those asked for last).
        num_images: how many images there is room for; 0 where none is held.
        num_bytes: memory that they take.
        reason: in words.
        pairs_per_s: what each place allowed when `auto` measured them; empty where it did not.
    """

    place: str
    policy: str
    num_images: int
    num_bytes: int
    reason: str
    pairs_per_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ResidencyOptions:
    """Where a caller wants tokens to be kept.

    Attributes:
        place: where tokens shall be read from; None: as the store reads now.
        max_bytes: device memory that resident tokens may take; None: most of what is free.
        ids: the images to keep on the device (any iterable, taken once); None: all, or those
            asked for last.

    Raises:
        RequestError: what cannot be meant, all of it, when they are made.
    """

    place: Place | None = None
    max_bytes: int | None = None
    ids: Iterable[str] | None = None

    def __post_init__(self) -> None:
        given = Arguments("ResidencyOptions")
        places = get_args(Place)
        if self.place is not None and self.place not in places:
            given.faults.append(f"residency: got {shown(self.place)}, expected {', '.join(places)}")
        if self.max_bytes is not None and not is_whole(self.max_bytes):
            given.faults.append(f"max_bytes: got {shown(self.max_bytes)}, expected 1 or more")
        if self.place not in ("device", "auto"):
            values = {"max_bytes": self.max_bytes, "ids": self.ids}
            given.faults += [
                f'{name}: only where residency is "device" or "auto"'
                for name, value in values.items()
                if value is not None
            ]
        if self.ids is not None:
            object.__setattr__(self, "ids", tuple(given.strings("ids", self.ids)))
        if given.faults:
            raise RequestError("tokens cannot be kept so", faults=given.faults)


def decide(
    options: ResidencyOptions,
    engine: Engine,
    store: TokenStore,
    device: Device,
    streams: Streams,
    *,
    queries: TokenizedQueries,
    num_slots: int,
) -> tuple[Residency, PoolPlan | None]:
    """Decide where the tokens of `store` are read from; `auto` measures. Changes nothing.

    Args:
        queries: one query to measure with.
        num_slots: slots of all pipelines that will share the device.

    Returns:
        The residency, and what is held where that is the device.

    Raises:
        RequestError: options that cannot be granted.
        EngineError, StoreError: measuring failed.
    """
    here = "host" if store.access == "resident" else "disk"
    if options.place is None:
        return _of_store(store, here, "as the open store reads"), None
    if options.place == "disk" and here == "host":
        raise RequestError(
            'residency is "disk", but the open store is held in memory',
            hint='open it with TokenStore.open(path, access="cached"), or give its path',
        )
    if options.place in ("disk", "host"):
        return _of_store(store, options.place, "as asked"), None
    from .pool import plan_pool

    plan, no_pool = None, ""
    try:
        plan = plan_pool(
            engine,
            store,
            device,
            max_bytes=options.max_bytes,
            ids=options.ids,
            num_slots=num_slots,
        )
    except EngineError as error:  # no memory of its own
        if options.place == "device":
            raise
        no_pool = error.message
    if plan is not None and options.place == "device":
        return plan.residency("as asked"), plan
    residency = Trial(engine, store, device, streams, queries, here, plan, no_pool).run()
    return residency, plan if residency.place == "device" else None


def _of_store(
    store: TokenStore, place: str, reason: str, pairs_per_s: Mapping[str, float] | None = None
) -> Residency:
    """Return the residency of a store that is read from disk, or held in this machine's memory."""
    num_images = len(store) if place == "host" else 0
    num_bytes = num_images * record_bytes(store.record_shape, store.layout.dtype)
    return Residency(place, "all", num_images, num_bytes, reason, pairs_per_s or {})


@dataclass(frozen=True, slots=True)
class Trial:
    """What the places are tried with.

    Attributes:
        queries: one query.
        here: where the store reads now, `disk` or `host`.
        plan: what a pool would hold; None where there cannot be one, and `no_pool` says why.
    """

    engine: Engine
    store: TokenStore
    device: Device
    streams: Streams
    queries: TokenizedQueries
    here: str
    plan: PoolPlan | None
    no_pool: str

    def run(self) -> Residency:
        """Measure all places and choose one; `place` may be `host` where the store is not yet.

        Raises:
            EngineError, StoreError: the engine, the device or the store failed.
        """
        if not len(self.store):
            return _of_store(self.store, self.here, "the store is empty")
        speeds, left_out = self.measure()
        place = choose(speeds)
        figures = ", ".join(f"{name} {speeds[name]:,.0f}" for name in ORDER if name in speeds)
        others = "".join(f"; not {name}: {why}" for name, why in left_out.items())
        reason = f"measured pairs/s: {figures}; {place} is the cheapest that keeps up{others}"
        if place == "device" and self.plan is not None:
            return self.plan.residency(reason, speeds)
        return _of_store(self.store, place, reason, speeds)

    def measure(self) -> tuple[dict[str, float], dict[str, str]]:
        """Return pairs/s by place, and why other places were left out."""
        rows, stages = self._sample(), {}
        left_out = {} if self.plan else {"device": self.no_pool}
        with closing(self.device.sibling()) as scratch:  # what the trial makes is freed with it
            for place in self._places(left_out):
                try:
                    stages[place] = self._stages(self._pipeline(place, scratch, rows), rows)
                except EngineError as error:
                    if place == self.here:
                        raise
                    left_out[place] = error.message
        speeds = speeds_of(stages, len(rows[0]))
        if "device" in speeds and self.plan is not None:
            held = min(1.0, self.plan.capacity / self.plan.num_images)
            speeds["device"] = 1 / (held / speeds["device"] + (1 - held) / speeds[self.here])
        return {name: round(speed, 1) for name, speed in speeds.items()}, left_out

    def _places(self, left_out: dict[str, str]) -> list[str]:
        """Return the places to try; note why the host is not among them."""
        places = [self.here]
        if self.here == "disk" and not self.store.writable:
            need = len(self.store) * record_bytes(self.store.record_shape, self.store.layout.dtype)
            if need <= SHARE_OF_HOST_MEMORY * available_memory_bytes():
                places.append("host")
            else:
                left_out["host"] = f"{need:,} bytes are over half of the free memory"
        return places if self.plan is None else [*places, "device"]

    def _sample(self) -> list[Int64]:
        """Return random rows for a warm-up and every round."""
        rows, most = self.store.live_rows(), self.engine.manifest.profile.max_pairs
        size = min(most, MAX_PAIRS_ON_HOST) if self.device.shares_memory else most
        random = np.random.default_rng(0)
        return [random.choice(rows, size) for _ in range(1 + NUM_ROUNDS)]

    def _pipeline(self, place: str, device: Device, rows: list[Int64]) -> Pipeline:
        """Make a pipeline that reads `rows` from a place."""
        source, every = tokens_for(self.engine, self.store), np.unique(np.concatenate(rows))
        pool = None
        if place == "device" and self.plan is not None:
            pool = self.plan.make_pool(device, every, len(every), checks_finite=False)
        elif place != self.here:
            dtype = self.engine.manifest.token_dtype
            source = HeldTokens.read_from(source, every, self.store.record_shape, dtype)
        pipeline = Pipeline(
            self.engine,
            source,
            device,
            num_slots=1,
            streams=self.streams,
            pool=pool,
            graphs=False,  # one would stay with the engine, and its capture count as compute
        )
        if pool is not None:
            pipeline.load(every)
        return pipeline

    def _stages(self, pipeline: Pipeline, rows: list[Int64]) -> Stages:
        """Return what the stages of a batch took; the first run only warms up."""
        asked = np.zeros(len(rows[0]), np.int64)
        _, *done = [pipeline.run(Request(self.queries, asked, some)) for some in rows]
        return Stages(
            median(run.gather_ms for run in done),
            median(max(run.upload_ms, run.download_ms) for run in done),
            min(run.compute_ms for run in done),
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
