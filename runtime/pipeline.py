"""Batches through the engine: gather into a slot, enqueue, collect in request order.

While the engine computes batch n, the calling thread gathers batch n+1. Slots, buffers and
events are made once, when the pipeline is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, perf_counter

import numpy as np
import numpy.typing as npt

from ..arrays import even_parts
from ..engines.contract import Engine
from ..errors import StoppedError
from ..kernels.device.contract import Device
from .batcher import PlannedBatch, plan_batches
from .graphs import GraphReport, Graphs
from .pool import TokenPool
from .slot import Slot, SlotRing
from .slot_tokens import Gathered
from .source import TokenSource
from .streams import Lane
from .text import TokenizedQueries

# One batch computes, one waits in the stream, one is being gathered.
NUM_SLOTS = 3


@dataclass(frozen=True, slots=True)
class Request:
    """N pairs to score.

    Attributes:
        queries: the tokenised queries.
        query_of_pair: int64 [N]: index into `queries` for each pair.
        rows: int64 [N]: the store's row of each pair's image.
        deadline: `time.monotonic()` seconds after which no further batch is started; None: none.
        cancelled: asked before each batch, from the thread that runs the request; True stops it.
    """

    queries: TokenizedQueries
    query_of_pair: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    deadline: float | None = None
    cancelled: Callable[[], bool] | None = None

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
        scores: float32 [N]: raw logits; NaN where the stored record is damaged or not finite, and
            where there is none.
        damaged: why a pair's stored record could not be used, by the pair's place.
        gather_ms: time the calling thread spent filling slots.
        upload_ms: time this request's batches took to the device; 0 where it shares host memory.
        compute_ms: time the engine spent on this request's batches.
        download_ms: time their scores took back; 0 where the device shares host memory.
        skipped: bool [N]: pairs that a cascade, or a request that was stopped, left without a
            score; None: there are none.
    """

    scores: npt.NDArray[np.float32]
    damaged: dict[int, str]
    gather_ms: float = 0.0
    upload_ms: float = 0.0
    compute_ms: float = 0.0
    download_ms: float = 0.0
    skipped: npt.NDArray[np.bool_] | None = None

    def leave_out(self, batches: Iterable[PlannedBatch]) -> None:
        """Mark the pairs of batches that were never started as skipped."""
        self.skipped = np.zeros(len(self.scores), np.bool_)
        for planned in batches:
            self.skipped[planned.pairs] = True
        self.scores[self.skipped] = np.nan

    def add_times(self, other: Scored) -> None:
        """Add the times of another run of the same request."""
        self.gather_ms += other.gather_ms
        self.upload_ms += other.upload_ms
        self.compute_ms += other.compute_ms
        self.download_ms += other.download_ms


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch on its way: its slot comes back when it is collected."""

    slot: Slot
    planned: PlannedBatch
    gathered: Gathered
    gather_ms: float


class Pipeline:
    """Runs the requests of many threads over one engine on one device."""

    def __init__(
        self,
        engine: Engine,
        source: TokenSource,
        device: Device,
        *,
        num_slots: int = NUM_SLOTS,
        lane: Lane | None = None,
        pool: TokenPool | None = None,
        graphs: bool = True,
    ):
        """Allocate the slots. All that is handed in stays the caller's, to close after it.

        Args:
            lane: the streams to go through, for pipelines that take turns (two engines that
                compute at once fight for the same cores) or use the caller's own stream; None
                makes some.
            pool: tokens that stay on the device; None sends them with every batch.
            graphs: whether batches of sizes that come again are captured as CUDA graphs.
        """
        self._engine = engine
        self._source = source
        self._hides_nan = engine.manifest.hides_nan
        self._device = device
        self._pool = pool
        self._lane = Lane(device) if lane is None else lane
        with device.current():
            self._ring = SlotRing([Slot(device, engine.manifest, pool) for _ in range(num_slots)])
        exclusive = self._lane.exclusive
        self._graphs = Graphs(engine, device, wanted=graphs, exclusive=exclusive)

    @property
    def graphs(self) -> GraphReport:
        """What became of the batches so far: graphs captured and launched, batches run plainly."""
        return self._graphs.report()

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
        self.check()
        result = Scored(np.empty(len(request.rows), np.float32), {})
        profile, lengths = self._engine.manifest.profile, request.queries.text_length
        left = deque(plan_batches(lengths, request.query_of_pair, profile))
        flights: deque[Flight] = deque()
        with self._device.current():
            try:
                while left:
                    request.check_wanted()
                    if len(left) > 1:
                        self._prefetch(request.rows[left[1].pairs])
                    slot = self._take_slot(request, flights, result)
                    flights.append(self.step(request, left.popleft(), slot))
                self._collect_all(flights, result)
            except StoppedError as stop:
                self._collect_all(flights, result)
                result.leave_out(left)
                stop.partial = result
                raise
            finally:
                for flight in flights:  # only after an error: their slots must come back
                    self._settle(flight.slot)
        return result

    @property
    def max_pairs(self) -> int:
        """How many pairs a batch holds at most."""
        return self._engine.manifest.profile.max_pairs

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
            for _ in range(1 if self._device.shares_memory else 2 * len(self._ring)):
                self.run(Request(queries, asked, rows))

    def load(self, rows: npt.NDArray[np.int64]) -> None:
        """Bring records (int64 [N], none twice) into the pool before anybody asks for them.

        As far as it takes them in; damaged ones stay out. At set-up only: no request runs yet.

        Raises:
            EngineError, StoreError: as `run`.
        """
        waiting: deque[Slot] = deque()
        with self._device.current():
            try:
                for part in even_parts(len(rows), self.max_pairs):
                    slot = self._ring.try_take()
                    if slot is None:
                        slot = self._land(waiting[0])
                        waiting.popleft()
                    waiting.append(slot)
                    self._load_one(slot, rows[part])
                for slot in waiting:
                    self._land(slot)
            finally:
                for slot in waiting:
                    self._settle(slot)

    def check(self) -> None:
        """Refuse a request that cannot run.

        Raises:
            EngineError: the device is lost, or this is a forked child of the process that opened
                the pipeline.
        """
        self._lane.check()

    def step(self, request: Request, planned: PlannedBatch, slot: Slot) -> Flight:
        """Gather one batch into `slot` and enqueue its forward; never waits for the engine."""
        began = perf_counter()
        try:
            slot.stage = "gather"
            self._lane.check()
            slot.fill_text(request.queries, planned)
            rows = request.rows[planned.pairs]
            gathered = slot.tokens.gather(self._source, rows, check_finite=self._hides_nan)
            gather_ms = (perf_counter() - began) * 1e3
            self._lane.enqueue(slot, planned, self._graphs)
        except Exception as error:
            failure = self._lane.failure(error, slot)
            self._settle(slot)
            raise failure from (None if failure is error else error)
        except BaseException:
            self._settle(slot)
            raise
        return Flight(slot, planned, gathered, gather_ms)

    def collect(self, flight: Flight, result: Scored) -> None:
        """Wait for one batch and put its scores where its pairs stand in the request."""
        slot, pairs = flight.slot, flight.planned.pairs
        self._collected(slot)
        slot.tokens.landed()
        result.scores[pairs] = slot.scores(flight.planned)
        if flight.gathered.not_finite.size:
            result.scores[pairs[flight.gathered.not_finite]] = np.nan
        for record in flight.gathered.damaged:
            place = int(pairs[record.position])
            result.scores[place] = np.nan
            result.damaged[place] = record.reason
        result.gather_ms += flight.gather_ms
        result.upload_ms += slot.uploaded.elapsed_ms(slot.started)
        result.compute_ms += slot.computed.elapsed_ms(slot.began)
        result.download_ms += slot.finished.elapsed_ms(slot.computed)

    def close(self) -> None:
        """Refuse further batches; those on their way still finish. May be called twice."""
        self._ring.close()

    def _load_one(self, slot: Slot, rows: npt.NDArray[np.int64]) -> None:
        """Gather records and send them into the pool; does not wait for them."""
        try:
            slot.stage = "gather"
            slot.tokens.gather(self._source, rows, check_finite=False)
            self._lane.load(slot)
        except Exception as error:
            failure = self._lane.failure(error, slot)
            raise failure from (None if failure is error else error)

    def _land(self, slot: Slot) -> Slot:
        """Wait until what `_load_one` sent is in the pool."""
        self._collected(slot)
        slot.tokens.landed()
        return slot

    def _collected(self, slot: Slot) -> None:
        """Wait for a slot's work; a failure carries its stage."""
        try:
            self._lane.collect(slot)
        except Exception as error:
            failure = self._lane.failure(error, slot)
            raise failure from (None if failure is error else error)

    def _prefetch(self, rows: npt.NDArray[np.int64]) -> None:
        """Announce the rows that will have to be read."""
        self._source.prefetch(rows if self._pool is None else self._pool.map.missing(rows))

    def _take_slot(self, request: Request, flights: deque[Flight], result: Scored) -> Slot:
        """Take a slot; while none is free, collect this request's oldest batch first."""
        while flights:
            slot = self._ring.try_take()
            if slot is not None:
                return slot
            self._collect_oldest(flights, result)
            request.check_wanted()
        return self._wait_for_slot(request)

    def _wait_for_slot(self, request: Request) -> Slot:
        """Wait in line; a deadline also ends the waiting, `cancelled` is asked at its end."""
        slot = None
        while slot is None:
            request.check_wanted()
            left_s = None if request.deadline is None else request.deadline - monotonic()
            slot = self._ring.take(left_s)
        return slot

    def _collect_all(self, flights: deque[Flight], result: Scored) -> None:
        while flights:
            self._collect_oldest(flights, result)

    def _collect_oldest(self, flights: deque[Flight], result: Scored) -> None:
        slot = flights[0].slot
        self.collect(flights[0], result)
        flights.popleft()
        self._ring.give_back(slot)

    def _settle(self, slot: Slot) -> None:
        """Give a slot back after an error, once no stream touches it any more."""
        with suppress(Exception):
            slot.finished.synchronize()
        slot.tokens.let_go()
        self._ring.give_back(slot)
