"""Batches through the engine: read into a slot, enqueue, collect in request order.

While the engine computes batch n, the calling thread reads batch n+1. Slots, buffers and events
are made once, when the pipeline is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..arrays import even_parts
from ..engines.contract import Engine
from ..errors import StoppedError
from ..kernels.device.contract import Device
from .batcher import PlannedBatch, plan_batches
from .slot import NONE_UNUSABLE, RingUsage, Slot, SlotRing, Unusable
from .source import TokenSource
from .streams import Streams
from .text import TokenizedQueries

if TYPE_CHECKING:
    from .graphs import GraphReport
    from .hidden import Hidden
    from .pool import TokenPool

# One batch computes, one waits in the stream, one is being read.
NUM_SLOTS = 3
_TIMES = "gather_ms", "upload_ms", "compute_ms", "download_ms"


@dataclass(frozen=True, slots=True)
class Request:
    """N pairs to score.

    Attributes:
        queries: the tokenised queries.
        query_of_pair: int64 [N]: index into `queries` for each pair.
        rows: int64 [N]: the store's row of each pair's image.
        deadline: `time.monotonic()` seconds after which no further batch is started; None: none.
        cancelled: asked before each batch, from the thread that runs the request; True stops it.
        planned: the one batch that all the pairs make, where the caller has formed it as
            `plan_batches` would; on a CPU it runs on the calling thread. None: plan now.
        hidden: where the engine keeps hidden states of the pairs, or goes on from them.
    """

    queries: TokenizedQueries
    query_of_pair: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    deadline: float | None = None
    cancelled: Callable[[], bool] | None = None
    planned: PlannedBatch | None = None
    hidden: Hidden | None = None

    def check_wanted(self) -> None:
        """Check that somebody still waits for the scores.

        Raises:
            StoppedError: the deadline passed, or the caller cancelled.
        """
        if self.deadline is not None and monotonic() >= self.deadline:
            raise StoppedError("the request's deadline passed before all of it was scored")
        if self.cancelled is not None and self.cancelled():
            raise StoppedError("the request was cancelled before all of it was scored")


@dataclass(slots=True)
class Scored:
    """What came out, in the order of the request's pairs.

    Attributes:
        scores: float32 [N]: raw logits; NaN where there is none, or of a record of no use.
        damaged: why a pair's stored record could not be used, by the pair's position.
        gather_ms: time the calling thread spent filling slots: text, and tokens from the store.
        upload_ms: time this request's batches took to the device; 0 where it shares host memory.
        compute_ms: time the engine spent on this request's batches.
        download_ms: time their scores took back; 0 where the device shares host memory.
        num_hits, num_misses: pairs whose tokens a pool on the device held, and those that the store
            had to be read for; 0 where there is no pool.
        num_resumed: pairs that went on from hidden states.
        skipped: bool [N]: pairs that a cascade, or a request that was stopped, left without a
            score; None: there are none.
    """

    scores: npt.NDArray[np.float32]
    damaged: dict[int, str]
    gather_ms: float = 0.0
    upload_ms: float = 0.0
    compute_ms: float = 0.0
    download_ms: float = 0.0
    num_hits: int = 0
    num_misses: int = 0
    num_resumed: int = 0
    skipped: npt.NDArray[np.bool_] | None = None

    def leave_out(self, batches: Iterable[PlannedBatch]) -> None:
        """Mark the pairs of batches that were never started as skipped."""
        self.skipped = np.zeros(len(self.scores), np.bool_)
        for planned in batches:
            self.skipped[planned.pairs] = True
        self.scores[self.skipped] = np.nan

    def add_work(self, other: Scored) -> None:
        """Add times and counts of another run of the same request."""
        for name in (*_TIMES, "num_hits", "num_misses", "num_resumed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def take_in(self, pairs: npt.NDArray[np.int64], part: Scored) -> None:
        """Take in what came out for some pairs."""
        self.scores[pairs] = part.scores
        self.damaged.update({int(pairs[one]): why for one, why in part.damaged.items()})
        self.add_work(part)


@dataclass(slots=True)
class Flight:
    """A batch on its way: its slot comes back when it is collected."""

    slot: Slot
    planned: PlannedBatch
    unusable: Unusable = NONE_UNUSABLE
    gather_ms: float = 0.0


class Pipeline:
    """Runs the requests of many threads over one engine on one device."""

    def __init__(
        self,
        engine: Engine,
        source: TokenSource,
        device: Device,
        *,
        num_slots: int = NUM_SLOTS,
        streams: Streams | None = None,
        pool: TokenPool | None = None,
        graphs: bool = True,
    ):
        """Allocate the slots. All that is handed in stays the caller's, to close after it.

        Args:
            streams: to go through, for pipelines that take turns (two engines that compute at
                once fight for the same cores) or use the caller's own stream; None makes some.
            pool: tokens that stay on the device; None sends them with every batch.
            graphs: whether batches of sizes that come again are captured as CUDA graphs.
        """
        self._engine = engine
        self._source = source
        self._hides_nan = engine.manifest.hides_nan
        self._device = device
        self._pool = pool
        self._streams = Streams(device) if streams is None else streams
        with device.current():
            self._slots = [
                Slot(device, engine.manifest, pool, by_row=engine.reads_rows)
                for _ in range(num_slots)
            ]
        self._ring = SlotRing(self._slots)
        self._no_graphs = _why_no_graphs(device, wanted=graphs, exclusive=self._streams.exclusive)
        if self._no_graphs is None:
            from .graphs import SlotGraphs

            for slot in self._slots:
                slot.graphs = SlotGraphs(engine, device)

    def run(self, request: Request) -> Scored:
        """Score every pair of `request`. Safe to call from many threads; they share the slots.

        Raises:
            RequestError: a query is longer than the engine's largest text bucket.
            StoppedError: the deadline passed or the caller cancelled. What was started finishes,
                `partial` is the `Scored` of it.
            EngineError: the engine or the device failed (`stage` says where), the pipeline was
                closed meanwhile, or this is a forked child.
            StoreError: the store cannot be read.
        """
        self._streams.check()
        result = Scored(np.full(len(request.rows), np.nan, np.float32), {})
        if request.hidden is not None:
            request.hidden.scores = result.scores
        lengths, profile = request.queries.text_length, self._engine.manifest.profile
        planned = [request.planned] if request.planned else None
        left = deque(planned or plan_batches(lengths, request.query_of_pair, profile))
        flights: deque[Flight] = deque()
        with self._device.current():
            try:
                while left:
                    request.check_wanted()
                    if len(left) > 1:
                        self._prefetch(request.rows[left[1].pairs])
                    slot = self._take_slot(request, flights, result)
                    flights.append(Flight(slot, left.popleft()))
                    self.step(request, flights[-1])
                while flights:
                    self._collect_oldest(flights, result)
            except StoppedError as stop:
                while flights:
                    self._collect_oldest(flights, result)
                result.leave_out(left)
                stop.partial = result
                raise
            finally:
                for flight in flights:  # only after an error: their slots must come back
                    self._release(flight.slot)
        return result

    def step(self, request: Request, flight: Flight) -> None:
        """Read one batch's tokens into its slot and enqueue its forward, or run it if `planned`.

        Raises:
            EngineError, StoreError: as `run`; `stage` says where.
        """
        slot, planned, began = flight.slot, flight.planned, perf_counter()
        try:
            slot.stage = "gather"
            self._streams.check()
            slot.fill_text(request.queries, planned)
            rows, hidden = request.rows[planned.pairs], request.hidden
            if hidden is None or not hidden.resumes:
                flight.unusable = slot.read(self._source, rows, check_finite=self._hides_nan)
            if hidden is not None:
                places = hidden.places(planned.pairs)
                slot.use_hidden(hidden.states, places, resumes=hidden.resumes)
            flight.gather_ms = (perf_counter() - began) * 1e3
            slot.num_batches += 1
            forward = self._engine.enqueue if slot.graphs is None else slot.graphs.enqueue
            self._streams.enqueue(slot, forward, alone=request.planned is not None)
        except Exception as error:
            self._streams.fail(error, slot)

    def collect(self, flight: Flight, result: Scored) -> None:
        """Wait for one batch and put its scores where its pairs stand in the request.

        Raises:
            EngineError: as `run`; `stage` says where.
        """
        slot, pairs, unusable = flight.slot, flight.planned.pairs, flight.unusable
        self._wait_for(slot)
        result.scores[pairs] = slot.scores
        if unusable.not_finite.size:
            result.scores[pairs[unusable.not_finite]] = np.nan
        for record in unusable.damaged:
            position = int(pairs[record.position])
            result.scores[position] = np.nan
            result.damaged[position] = record.reason
        if slot.pooled is not None:
            result.num_hits += slot.pooled.num_hits
            result.num_misses += slot.pooled.num_misses
        result.gather_ms += flight.gather_ms
        result.compute_ms += slot.computed.elapsed_ms(slot.began)
        if not self._device.shares_memory:
            result.upload_ms += slot.uploaded.elapsed_ms(slot.started)
            result.download_ms += slot.finished.elapsed_ms(slot.computed)

    def load(self, rows: npt.NDArray[np.int64]) -> None:
        """Bring records (int64 [N], none twice) into the pool before anybody asks for them.

        As far as it takes them in; damaged ones stay out. At set-up only: no request runs yet.

        Raises:
            EngineError, StoreError: as `run`.
        """
        loading: deque[Slot] = deque()
        with self._device.current():
            try:
                for part in even_parts(len(rows), self.max_pairs):
                    slot = self._ring.try_take()
                    if slot is None:
                        self._wait_for(loading[0])
                        slot = loading.popleft()
                    loading.append(slot)
                    self._load_one(slot, rows[part])
                for slot in loading:
                    self._wait_for(slot)
            finally:
                for slot in loading:
                    self._release(slot)

    def warm_up(self, rows: npt.NDArray[np.int64]) -> None:
        """Score `rows` for a query of every text bucket; on a GPU twice in every slot.

        Raises:
            As `run`.
        """
        text, profile = self._engine.manifest.bundle.text, self._engine.manifest.profile
        asked = np.zeros(len(rows), np.int64)
        for bucket in profile.text_buckets:
            length = min(bucket, text.max_wordpieces + 2)
            ids = np.zeros((1, length), np.int32)
            ids[0, 0], ids[0, -1] = text.cls_id, text.sep_id
            queries = TokenizedQueries(ids, np.array([length], np.int32), np.zeros(1, np.bool_))
            for _ in range(1 if self._device.shares_memory else 2 * len(self._slots)):
                self.run(Request(queries, asked, rows))

    @property
    def max_pairs(self) -> int:
        """How many pairs a batch holds at most."""
        return self._engine.manifest.profile.max_pairs

    @property
    def graphs(self) -> GraphReport:
        """What became of the batches so far: graphs captured and launched, batches run plainly."""
        from .graphs import GraphReport, total

        if self._no_graphs is None:
            return total(slot.graphs.report() for slot in self._slots if slot.graphs is not None)
        num_batches = sum(slot.num_batches for slot in self._slots)
        return GraphReport(0, 0, 0, {self._no_graphs: num_batches} if num_batches else {})

    def usage(self) -> RingUsage:
        """Return how many slots there are and are free, and how many requests wait for one."""
        return self._ring.usage()

    def check(self) -> None:
        """Refuse a request that cannot run.

        Raises:
            EngineError: the device is lost, or this is a forked child of the process that opened
                the pipeline.
        """
        self._streams.check()

    def close(self) -> None:
        """Refuse further batches; those on their way still finish. May be called twice."""
        self._ring.close()

    def _take_slot(self, request: Request, flights: deque[Flight], result: Scored) -> Slot:
        """Take a slot; while none is free, collect this request's oldest batch first.

        A request without a batch on its way waits in line: its deadline ends the waiting,
        `cancelled` is asked at its end.
        """
        while True:
            if flights:
                slot = self._ring.try_take()
            else:
                deadline = request.deadline
                slot = self._ring.take(None if deadline is None else deadline - monotonic())
            if slot is not None:
                return slot
            if flights:
                self._collect_oldest(flights, result)
            request.check_wanted()

    def _collect_oldest(self, flights: deque[Flight], result: Scored) -> None:
        """Collect the batch that was started first, and give its slot back."""
        slot = flights[0].slot
        self.collect(flights[0], result)
        flights.popleft()
        self._ring.give_back(slot)

    def _wait_for(self, slot: Slot) -> None:
        """Wait for a slot's work; a failure carries its stage."""
        try:
            self._streams.collect(slot)
        except Exception as error:
            self._streams.fail(error, slot)
        if slot.pooled is not None:
            slot.pooled.keep()

    def _load_one(self, slot: Slot, rows: npt.NDArray[np.int64]) -> None:
        """Read records and send them into the pool; does not wait for them."""
        try:
            slot.stage = "gather"
            slot.read(self._source, rows, check_finite=False)
            self._streams.load(slot)
        except Exception as error:
            self._streams.fail(error, slot)

    def _prefetch(self, rows: npt.NDArray[np.int64]) -> None:
        """Announce the rows that will have to be read."""
        self._source.prefetch(rows if self._pool is None else self._pool.map.missing(rows))

    def _release(self, slot: Slot) -> None:
        """Give a slot back after an error, once no stream touches it any more."""
        with suppress(Exception):
            slot.finished.synchronize()
        if slot.pooled is not None:
            slot.pooled.release()
        self._ring.give_back(slot)


def _why_no_graphs(device: Device, *, wanted: bool, exclusive: bool) -> str | None:
    """Return why no batch on `device` gets a graph, None where some may."""
    if not wanted:
        return "graphs are turned off"
    if device.shares_memory:
        return f"the {device.name} launches no kernels: a graph would save nothing"
    if not device.offers_graphs:
        return f"this library offers no graphs on {device.name}: use the cuda_core device"
    if not exclusive:
        return "the stream is the caller's, whose other work a capture could swallow"
    return None
