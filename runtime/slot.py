"""Staging slots: the memory one batch passes through, and the ring that hands slots out fairly."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..arrays import Array
from ..engines.contract import Batch
from ..engines.manifest import EngineManifest
from ..errors import EngineError
from ..kernels.device.contract import Device, Stream
from .batcher import PlannedBatch
from .pool import TokenPool
from .slot_tokens import PooledTokens, SlotTokens, Staged, StreamedTokens
from .text import TokenizedQueries


@dataclass(frozen=True, slots=True)
class _Views:
    """A slot's memory as arrays of one batch's sizes: the host's side, then the engine's."""

    sizes: tuple[int, int, int]
    text_ids: Array
    text_length: Array
    query_of_pair: Array
    scores: Array
    batch: Batch
    batch_scores: Array


class Slot:
    """Everything one batch needs, allocated once for the largest batch of the engine's profile.

    Views of the same sizes are always the same memory: captured graphs hold their addresses.

    Whoever took the slot from the ring owns it until `SlotRing.give_back`; the engine may read
    it until `finished` was passed.

    Attributes:
        tokens: the batch's visual tokens, and how they get to the engine.
        stage: where its batch is: `gather`, `copy`, `compute` or `collect`.
        started, uploaded: around the copy to the device.
        began, computed: around the engine's work.
        finished: the scores lie on the host.
    """

    def __init__(self, device: Device, manifest: EngineManifest, pool: TokenPool | None = None):
        """Allocate; `pool` holds tokens on the device, None: every batch brings its own."""
        max_pairs, sizes = manifest.profile.max_pairs, manifest.bundle.sizes
        shape = (sizes.num_tokens, sizes.hidden)
        self.tokens: SlotTokens = (
            StreamedTokens(device, max_pairs, shape, manifest.token_dtype)
            if pool is None
            else PooledTokens(device, pool, max_pairs)
        )
        self._text_ids = Staged(device, max_pairs * max(manifest.profile.text_buckets), "int32")
        self._text_length = Staged(device, max_pairs, "int32")
        self._query_of_pair = Staged(device, max_pairs, "int32")
        self._scores = Staged(device, max_pairs, "float32")
        self._views: _Views | None = None
        self._filled_for: tuple[object, object, object] = None, None, None
        self.stage = "gather"
        self.started = device.event()
        self.finished = device.event()
        shared = device.shares_memory  # nothing is copied, so the copies' ends are the others
        self.uploaded = self.started if shared else device.event()
        self.began = self.started if shared else device.event()
        self.computed = self.finished if shared else device.event()

    def fill_text(self, queries: TokenizedQueries, planned: PlannedBatch) -> None:
        """Copy the ids of the batch's queries into the slot, padded with 0 to the bucket."""
        views = self._of(planned)
        held_views, held_queries, held_numbers = self._filled_for
        if views is held_views and queries is held_queries and planned.queries is held_numbers:
            return  # one query's next batch: the slot holds its text already
        width = min(planned.bucket, queries.text_ids.shape[1])
        views.text_ids[:, :width] = queries.text_ids[planned.queries, :width]
        views.text_ids[:, width:] = 0
        views.text_length[:] = queries.text_length[planned.queries]
        views.query_of_pair[:] = planned.query_of_pair
        self._filled_for = views, queries, planned.queries

    def scores(self, planned: PlannedBatch) -> Array:
        """Return float32 [P] on the host, to be read once `finished` was passed."""
        return self._of(planned).scores

    def engine_views(self, planned: PlannedBatch) -> tuple[Batch, Array]:
        """Return the batch as the engine sees it, and float32 [P] where it writes; no copy."""
        views = self._of(planned)
        return views.batch, views.batch_scores

    def _of(self, planned: PlannedBatch) -> _Views:
        """Return the views of this batch's sizes; most batches have those of the last one."""
        sizes = len(planned.queries), planned.bucket, len(planned.pairs)
        if self._views is None or self._views.sizes != sizes:
            self._views = self._make_views(*sizes)
        return self._views

    def _make_views(self, num_queries: int, bucket: int, num_pairs: int) -> _Views:
        tokens, scales = self.tokens.engine(num_pairs)
        return _Views(
            (num_queries, bucket, num_pairs),
            self._text_ids.host(num_queries, bucket),
            self._text_length.host(num_queries),
            self._query_of_pair.host(num_pairs),
            self._scores.host(num_pairs),
            Batch(
                text_ids=self._text_ids.engine(num_queries, bucket),
                text_length=self._text_length.engine(num_queries),
                query_of_pair=self._query_of_pair.engine(num_pairs),
                visual_tokens=tokens,
                visual_scales=scales,
            ),
            self._scores.engine(num_pairs),
        )

    def upload(self, stream: Stream, planned: PlannedBatch) -> None:
        """Copy what was filled to the device, in the order of `stream`."""
        num_queries, num_pairs = len(planned.queries), len(planned.pairs)
        self._text_ids.upload(stream, num_queries * planned.bucket)
        self._text_length.upload(stream, num_queries)
        self._query_of_pair.upload(stream, num_pairs)
        self.tokens.upload(stream)

    def download(self, stream: Stream, num_pairs: int) -> None:
        """Copy the scores back to the host, in the order of `stream`."""
        self._scores.download(stream, num_pairs)


class _Ticket:
    """One thread's place in the queue for a slot."""

    def __init__(self) -> None:
        self.served = threading.Event()
        self.slot: Slot | None = None


class SlotRing:
    """Hands out slots, first come first served, to any number of threads."""

    def __init__(self, slots: Sequence[Slot]):
        self._free = deque(slots)
        self._num_slots = len(slots)
        self._queue: deque[_Ticket] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        """How many slots there are, free or not."""
        return self._num_slots

    def try_take(self) -> Slot | None:
        """Return a free slot, or None when there is none or others wait for one.

        Raises:
            EngineError: the ring was closed.
        """
        with self._lock:
            self._check_open()
            return self._free.popleft() if self._free and not self._queue else None

    def take(self, timeout_s: float | None = None) -> Slot | None:
        """Return a slot, waiting in line for it. A caller that holds slots must not wait here.

        Args:
            timeout_s: seconds to wait at most, then None is returned; None waits forever.

        Raises:
            EngineError: the ring was closed, before or while this call waited.
        """
        with self._lock:
            self._check_open()
            if self._free and not self._queue:
                return self._free.popleft()
            ticket = _Ticket()
            self._queue.append(ticket)
        try:
            served = ticket.served.wait(timeout_s)
        except BaseException:  # an interrupted wait must not lose a slot
            self._leave(ticket)
            raise
        if not served:
            self._leave(ticket)
            return None
        if ticket.slot is None:
            raise EngineError("the reranker was closed while this request waited")
        return ticket.slot

    def give_back(self, slot: Slot) -> None:
        """Return a slot that no stream works on any more; the longest waiting thread gets it."""
        with self._lock:
            if self._queue:
                ticket = self._queue.popleft()
                ticket.slot = slot
                ticket.served.set()
            else:
                self._free.append(slot)

    def close(self) -> None:
        """Refuse every further `take` and send the waiting threads away."""
        with self._lock:
            self._closed = True
            for ticket in self._queue:
                ticket.served.set()
            self._queue.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the reranker is closed", hint="open it again with Reranker.open")

    def _leave(self, ticket: _Ticket) -> None:
        with self._lock:
            if ticket in self._queue:
                self._queue.remove(ticket)
        if ticket.slot is not None:
            self.give_back(ticket.slot)
