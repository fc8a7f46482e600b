"""Slots: the memory that one batch passes through, made once, and the ring that hands them out."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..arrays import Array, Int32, Int64
from ..engines.contract import Batch
from ..engines.manifest import EngineManifest
from ..errors import EngineError
from ..kernels.device.contract import Device, Stream
from ..tokens import not_finite
from .batcher import PlannedBatch
from .source import TokenSource
from .store import BadRecord
from .text import TokenizedQueries

if TYPE_CHECKING:
    from .graphs import SlotGraphs
    from .pool import PooledTokens, TokenPool

MOST_FITS = 64  # sizes of batches whose views a slot keeps
NO_PAIRS: Int64 = np.empty(0, np.int64)


class Unusable(NamedTuple):
    """Pairs of a batch that get no score.

    Attributes:
        damaged: records that could not be read; `position` is the pair's position in the batch.
        not_finite: int64: pairs whose tokens hold NaN or infinity, where that was looked for.
    """

    damaged: Sequence[BadRecord] = ()
    not_finite: Int64 = NO_PAIRS


NONE_UNUSABLE = Unusable()


class Staged:
    """One tensor of a slot: pinned host memory and its mirror where the engine runs."""

    def __init__(self, device: Device, num_elements: int, dtype: str):
        self._pinned = device.pinned(num_elements, np.dtype(dtype))
        self._mirror = device.mirror(self._pinned)

    def host(self, *shape: int) -> Array:
        """Return the host side as `shape`; no copy."""
        return self._pinned.view(shape)

    def engine(self, *shape: int) -> Array:
        """Return the engine's side as `shape`; no copy."""
        return self._mirror.view(shape)

    def upload(self, stream: Stream, num_elements: int) -> None:
        """Copy the first elements to the engine's side, in the order of `stream`."""
        stream.upload(self._mirror, self._pinned, num_elements)

    def download(self, stream: Stream, num_elements: int) -> None:
        """Copy the first elements back to the host, in the order of `stream`."""
        stream.download(self._pinned, self._mirror, num_elements)


class StagedRecords:
    """Room for `max_records` records: tokens, and scales where they are int8."""

    def __init__(self, device: Device, max_records: int, shape: tuple[int, int], dtype: str):
        num_tokens, hidden = self._shape = shape
        self._tokens = Staged(device, max_records * num_tokens * hidden, dtype)
        scaled = dtype == "int8"
        self._scales = Staged(device, max_records * num_tokens, "float16") if scaled else None

    def host(self, num_records: int) -> tuple[Array, Array | None]:
        """Return where the store writes: tokens [N, m, H], scales float16 [N, m]; pinned."""
        scales = None if self._scales is None else self._scales.host(num_records, self._shape[0])
        return self._tokens.host(num_records, *self._shape), scales

    def engine(self, num_records: int) -> tuple[Array, Array | None]:
        """Return the same on the engine's side."""
        scales = None if self._scales is None else self._scales.engine(num_records, self._shape[0])
        return self._tokens.engine(num_records, *self._shape), scales

    in_batch = engine

    def upload(self, stream: Stream, num_records: int) -> None:
        """Copy the first records to the engine's side, in the order of `stream`."""
        self._tokens.upload(stream, num_records * math.prod(self._shape))
        if self._scales is not None:
            self._scales.upload(stream, num_records * self._shape[0])


class Slot:
    """Everything one batch needs, allocated once for the largest batch of the engine's profile.

    Views of the same sizes are always the same memory: captured graphs hold their addresses.

    Whoever took the slot from the ring owns it until `SlotRing.give_back`; the engine may read
    it until `finished` was passed.

    Attributes:
        host, scores: the batch's arrays on the host, and float32 [P] of its scores, to be read once
            `finished` was passed.
        batch, batch_scores: the same as the engine sees them.
        pooled: where tokens stay on a GPU, this slot's way to them; else None, and while its batch
            goes on from hidden states.
        graphs: captures and launches this slot's forwards; None: the engine runs each of them.
        num_batches: how many batches it took so far.
        stage: where its batch is: `gather`, `copy`, `compute` or `collect`.
        started, uploaded: around the copy to the device.
        began, computed: around the engine's work.
        finished: the scores lie on the host.
    """

    def __init__(
        self,
        device: Device,
        manifest: EngineManifest,
        pool: TokenPool | None = None,
        *,
        by_row: bool = False,
    ):
        """Allocate.

        Args:
            pool: holds tokens on the device; None: every batch brings its own.
            by_row: the engine finds them there by row; otherwise they are gathered for it.
        """
        max_pairs, sizes = manifest.profile.max_pairs, manifest.bundle.sizes
        self._tokens: StagedRecords | PooledTokens
        self.pooled: PooledTokens | None = None
        self._pooled: PooledTokens | None = None
        self._resumes = False
        if pool is None:
            shape = sizes.num_tokens, sizes.hidden
            self._tokens = StagedRecords(device, max_pairs, shape, manifest.token_dtype)
        else:
            self._tokens = self._pooled = pool.tokens_of_slot(max_pairs, by_row=by_row)
            self.pooled = self._pooled
        self.graphs: SlotGraphs | None = None
        self._text_ids = Staged(device, max_pairs * max(manifest.profile.text_buckets), "int32")
        self._text_length = Staged(device, max_pairs, "int32")
        self._query_of_pair = Staged(device, max_pairs, "int32")
        self._places = Staged(device, max_pairs, "int32")
        self._scores = Staged(device, max_pairs, "float32")
        self._filled_for: tuple[object, object]
        self._fits: dict[tuple[int, int, int], tuple[Batch, Batch, Array, Array]] = {}
        self.batch: Batch
        self._fit(1, max(manifest.profile.text_buckets), 1)
        self.num_batches = 0
        self.stage = "gather"
        self.started = device.event()
        self.finished = device.event()
        shared = device.shares_memory  # nothing is copied, so the copies' ends are the others
        self.uploaded = self.started if shared else device.event()
        self.began = self.started if shared else device.event()
        self.computed = self.finished if shared else device.event()

    def fill_text(self, queries: TokenizedQueries, planned: PlannedBatch) -> None:
        """Copy the ids of the batch's queries into the slot, padded with 0 to the bucket."""
        sizes = len(planned.queries), planned.bucket, len(planned.pairs)
        if self.batch.hidden is not None:  # the batch before had some
            self.batch = replace(self.batch, hidden=None)
            self._resumes, self.pooled = False, self._pooled
        if sizes != self._sizes:
            self._fit(*sizes)
        held_queries, held_numbers = self._filled_for
        if queries is held_queries and planned.queries is held_numbers:
            return  # one query's next batch: the slot holds its text already
        text_ids, text_length = queries.text_ids, queries.text_length
        if sizes[0] != len(text_length):  # else it is all of them
            text_ids, text_length = text_ids[planned.queries], text_length[planned.queries]
        host, width = self.host, min(planned.bucket, text_ids.shape[1])
        host.text_ids[:, :width] = text_ids[:, :width]
        if width < planned.bucket:
            host.text_ids[:, width:] = 0
        host.text_length[:] = text_length
        host.query_of_pair[:] = planned.query_of_pair
        self._filled_for = queries, planned.queries

    def read(self, source: TokenSource, rows: Int64, *, check_finite: bool) -> Unusable:
        """Read the batch's records (int64 [P]) into pinned memory, as far as they are needed."""
        if self.pooled is not None:
            return self.pooled.read(source, rows, check_finite=check_finite)
        tokens, scales = self.host.visual_tokens, self.host.visual_scales
        damaged = source.read(rows, tokens, scales, bad="mark")
        return Unusable(damaged, not_finite(tokens, scales) if check_finite else NO_PAIRS)

    def use_hidden(self, states: Array, places: Int32, *, resumes: bool) -> None:
        """Let the engine keep the pairs' hidden states at `places` (int32 [P]) of `states`.

        Args:
            resumes: go on from those that lie there; the batch has no tokens then.
        """
        num_pairs = self._sizes[2]
        self._places.host(num_pairs)[:] = places
        self.batch = replace(self.batch, hidden=(states, self._places.engine(num_pairs)))
        self._resumes = resumes
        if resumes:
            self.pooled = None

    def upload(self, stream: Stream) -> None:
        """Copy what was filled to the device, in the order of `stream`."""
        num_queries, bucket, num_pairs = self._sizes
        self._text_ids.upload(stream, num_queries * bucket)
        self._text_length.upload(stream, num_queries)
        self._query_of_pair.upload(stream, num_pairs)
        if self.batch.hidden is not None:
            self._places.upload(stream, num_pairs)
        if not self._resumes:
            self.upload_tokens(stream)

    def upload_tokens(self, stream: Stream) -> None:
        """Copy the records that were read, and no text, in the order of `stream`."""
        if isinstance(self._tokens, StagedRecords):
            self._tokens.upload(stream, self._sizes[2])
        else:
            self._tokens.upload(stream)

    def assemble(self, stream: Stream) -> None:
        """Put the batch's tokens where the engine reads them: uploads are there already."""
        if self.pooled is not None:
            self.pooled.assemble(stream)

    def download(self, stream: Stream) -> None:
        """Copy the scores back to the host, in the order of `stream`."""
        self._scores.download(stream, self._sizes[2])

    def _fit(self, num_queries: int, bucket: int, num_pairs: int) -> None:
        """Take the views of a batch's sizes; most batches have those of one a little before."""
        self._sizes = sizes = num_queries, bucket, num_pairs
        self._filled_for = None, None
        fit = self._fits.get(sizes)
        if fit is None:
            fit = self._views(*sizes)
            if self._pooled is None:  # whose tokens lie elsewhere in every batch
                if len(self._fits) == MOST_FITS:
                    self._fits.clear()
                self._fits[sizes] = fit
        self.host, self.batch, self.scores, self.batch_scores = fit

    def _views(
        self, num_queries: int, bucket: int, num_pairs: int
    ) -> tuple[Batch, Batch, Array, Array]:
        """Return what `host`, `batch`, `scores` and `batch_scores` are for these sizes."""
        host = Batch(
            self._text_ids.host(num_queries, bucket),
            self._text_length.host(num_queries),
            self._query_of_pair.host(num_pairs),
            *self._tokens.host(num_pairs),
        )
        batch = Batch(
            self._text_ids.engine(num_queries, bucket),
            self._text_length.engine(num_queries),
            self._query_of_pair.engine(num_pairs),
            *self._tokens.in_batch(num_pairs),
        )
        return host, batch, self._scores.host(num_pairs), self._scores.engine(num_pairs)


class _Waiting:
    """A thread in line for a slot."""

    def __init__(self) -> None:
        self.served = threading.Event()
        self.slot: Slot | None = None


class RingUsage(NamedTuple):
    """Slots of a pipeline at one moment: all, those that are free, and threads in line for one."""

    num_slots: int
    num_free: int
    num_waiting: int


class SlotRing:
    """Hands out slots, first come first served, to any number of threads."""

    def __init__(self, slots: Sequence[Slot]):
        self._free = deque(slots)
        self._num_slots = len(slots)
        self._line: deque[_Waiting] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def usage(self) -> RingUsage:
        """Return how many slots there are and are free, and how many threads wait for one."""
        with self._lock:
            return RingUsage(self._num_slots, len(self._free), len(self._line))

    def try_take(self) -> Slot | None:
        """Return a free slot, or None when there is none or others wait for one.

        Raises:
            EngineError: the ring was closed.
        """
        with self._lock:
            if self._closed:
                raise _closed()
            return self._free.popleft() if self._free and not self._line else None

    def take(self, timeout_s: float | None = None) -> Slot | None:
        """Return a slot, waiting in line for it. A caller that holds slots must not wait here.

        Args:
            timeout_s: seconds to wait at most, then None is returned; None waits forever.

        Raises:
            EngineError: the ring was closed, before or while this call waited.
        """
        with self._lock:
            if self._closed:
                raise _closed()
            if self._free and not self._line:
                return self._free.popleft()
            me = _Waiting()
            self._line.append(me)
        try:
            served = me.served.wait(timeout_s)
        except BaseException:  # an interrupted wait must not lose a slot
            self._leave(me)
            raise
        if not served:
            self._leave(me)
            return None
        if me.slot is None:
            raise EngineError("the reranker was closed while this request waited")
        return me.slot

    def give_back(self, slot: Slot) -> None:
        """Return a slot that no stream works on any more; the longest waiting thread gets it."""
        with self._lock:
            if self._line:
                first = self._line.popleft()
                first.slot = slot
                first.served.set()
            else:
                self._free.append(slot)

    def close(self) -> None:
        """Refuse every further `take` and send the waiting threads away."""
        with self._lock:
            self._closed = True
            for waiting in self._line:
                waiting.served.set()
            self._line.clear()

    def _leave(self, me: _Waiting) -> None:
        with self._lock:
            if me in self._line:
                self._line.remove(me)
        if me.slot is not None:
            self.give_back(me.slot)


def _closed() -> EngineError:
    return EngineError("the reranker is closed", hint="open it again with Reranker.open")
