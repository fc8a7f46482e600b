"""Batches through the engine: gather into a slot, enqueue, collect in request order.

While the engine computes batch n, the calling thread gathers batch n+1. Slots, buffers and
events are made once, when the pipeline is.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from time import perf_counter

import numpy as np
import numpy.typing as npt

from ..engines.contract import Engine
from ..engines.int8_tokens import not_finite
from ..engines.precision.quantize import QUANTIZED
from ..errors import EdjeError, EngineError
from .batcher import PlannedBatch, plan_batches
from .device.protocol import Device, Stream
from .staging import Slot, SlotRing
from .store import BadRecord
from .text import TokenizedQueries
from .token_source import TokenSource

# One batch computes, one waits in the stream, one is being gathered.
NUM_SLOTS = 3
_NONE: npt.NDArray[np.int64] = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Request:
    """N pairs to score.

    Attributes:
        queries: the tokenised queries.
        query_of_pair: int64 [N]: index into `queries` for each pair.
        rows: int64 [N]: the store's row of each pair's image.
    """

    queries: TokenizedQueries
    query_of_pair: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


@dataclass(slots=True)
class Scored:
    """What came out, in the order of the request's pairs.

    Attributes:
        scores: float32 [N]: raw logits; NaN where the stored record is damaged or not finite.
        damaged: why a pair's stored record could not be used, by the pair's place.
        gather_ms: time the calling thread spent filling slots.
        compute_ms: time the engine spent on this request's batches.
        skipped: bool [N]: pairs that a cascade left without a score; None: it left out none.
    """

    scores: npt.NDArray[np.float32]
    damaged: dict[int, str]
    gather_ms: float = 0.0
    compute_ms: float = 0.0
    skipped: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch on its way: its slot comes back when it is collected.

    Attributes:
        not_finite: int64: which of its pairs' tokens hold NaN or infinity.
    """

    slot: Slot
    planned: PlannedBatch
    damaged: list[BadRecord]
    not_finite: npt.NDArray[np.int64]
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
        beside: Pipeline | None = None,
    ):
        """Allocate the slots. Engine, source and device stay the caller's, to close after it.

        Args:
            beside: a pipeline whose stream this one shares, so that two engines never compute
                at once and fight for the same cores.
        """
        self._engine = engine
        self._source = source
        # Rounding to int8 or fp8 turns NaN into a number, and the score into a wrong one.
        self._hides_nan = (
            engine.manifest.precision in QUANTIZED or engine.manifest.token_dtype == "int8"
        )
        self._stream: Stream = device.stream() if beside is None else beside._stream
        lock = threading.Lock() if beside is None else beside._submitting
        self._submitting: threading.Lock = lock  # keeps one batch's work together in the stream
        self._ring = SlotRing([Slot(device, engine.manifest) for _ in range(num_slots)])

    def run(self, request: Request) -> Scored:
        """Score every pair of `request`. Safe to call from many threads; they share the slots.

        Raises:
            RequestError: a query is longer than the engine's largest text bucket.
            EngineError: the engine failed, or the pipeline was closed meanwhile.
            StoreError: the store cannot be read.
        """
        num_pairs = len(request.rows)
        result = Scored(np.empty(num_pairs, np.float32), {})
        profile = self._engine.manifest.profile
        flights: deque[Flight] = deque()
        try:
            lengths = request.queries.text_length
            batches = plan_batches(lengths, request.query_of_pair, profile)
            for planned, following in zip_longest(batches, batches[1:]):
                if following is not None:
                    self._source.prefetch(request.rows[following.pairs])
                slot = self._take_slot(flights, result)
                flights.append(self.step(request, planned, slot))
            while flights:
                self._collect_oldest(flights, result)
        finally:
            for flight in flights:  # only after an error: their slots must come back
                self._settle(flight.slot)
        return result

    def step(self, request: Request, planned: PlannedBatch, slot: Slot) -> Flight:
        """Gather one batch into `slot` and enqueue its forward; never waits for the engine."""
        stream, num_pairs = self._stream, len(planned.pairs)
        began = perf_counter()
        try:
            slot.fill_text(request.queries, planned)
            damaged, broken = self._gather(request.rows[planned.pairs], slot)
            gather_ms = (perf_counter() - began) * 1e3
            with self._submitting:
                slot.upload(stream, planned)
                stream.record(slot.started)
                scores = slot.engine_scores(num_pairs)
                self._engine.enqueue(slot.engine_batch(planned), scores, stream=stream)
                slot.download(stream, num_pairs)
                stream.record(slot.finished)
        except BaseException:
            with self._submitting:
                stream.record(slot.finished)
            self._settle(slot)
            raise
        return Flight(slot, planned, damaged, broken, gather_ms)

    def collect(self, flight: Flight, result: Scored) -> None:
        """Wait for one batch and put its scores where its pairs stand in the request."""
        slot, pairs = flight.slot, flight.planned.pairs
        try:
            slot.finished.synchronize()
        except EdjeError:
            raise
        except Exception as error:
            raise EngineError(f"the engine failed on a batch: {error}") from error
        result.scores[pairs] = slot.host_scores(len(pairs))
        result.scores[pairs[flight.not_finite]] = np.nan
        for record in flight.damaged:
            place = int(pairs[record.position])
            result.scores[place] = np.nan
            result.damaged[place] = record.reason
        result.gather_ms += flight.gather_ms
        result.compute_ms += slot.finished.elapsed_ms(slot.started)

    def close(self) -> None:
        """Refuse further batches; those on their way still finish. May be called twice."""
        self._ring.close()

    def _gather(
        self, rows: npt.NDArray[np.int64], slot: Slot
    ) -> tuple[list[BadRecord], npt.NDArray[np.int64]]:
        """Fill the slot's tokens; return the damaged records, and which are not finite."""
        tokens, scales = slot.host_tokens(len(rows)), slot.host_scales(len(rows))
        damaged = self._source.read(rows, tokens, scales, bad="mark")
        return damaged, not_finite(tokens, scales) if self._hides_nan else _NONE

    def _take_slot(self, flights: deque[Flight], result: Scored) -> Slot:
        """Take a slot; while none is free, collect this request's oldest batch first."""
        while flights:
            slot = self._ring.try_take()
            if slot is not None:
                return slot
            self._collect_oldest(flights, result)
        return self._ring.take()

    def _collect_oldest(self, flights: deque[Flight], result: Scored) -> None:
        slot = flights[0].slot
        self.collect(flights[0], result)
        flights.popleft()
        self._ring.give_back(slot)

    def _settle(self, slot: Slot) -> None:
        """Give a slot back after an error, once the stream no longer touches it."""
        with suppress(Exception):
            slot.finished.synchronize()
        self._ring.give_back(slot)
