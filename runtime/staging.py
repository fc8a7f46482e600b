"""Staging slots: the memory one batch passes through, and the ring that hands slots out fairly."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engines.contract import Batch
from ..engines.manifest import EngineManifest
from ..errors import EngineError
from .batcher import PlannedBatch
from .device.protocol import Device, Stream
from .text import TokenizedQueries

Array = npt.NDArray[Any]


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
        stream.upload(self._mirror, self._pinned, num_elements)

    def download(self, stream: Stream, num_elements: int) -> None:
        stream.download(self._pinned, self._mirror, num_elements)


class Slot:
    """Everything one batch needs, allocated once for the largest batch of the engine's profile.

    Whoever took the slot from the ring owns it until `SlotRing.give_back`; the engine may read
    it until `finished` was passed.
    """

    def __init__(self, device: Device, manifest: EngineManifest):
        max_pairs, sizes = manifest.profile.max_pairs, manifest.bundle.sizes
        self._token_shape = (sizes.num_tokens, sizes.hidden)
        self._text_ids = Staged(device, max_pairs * max(manifest.profile.text_buckets), "int32")
        self._text_length = Staged(device, max_pairs, "int32")
        self._query_of_pair = Staged(device, max_pairs, "int32")
        num_values = max_pairs * sizes.num_tokens * sizes.hidden
        self._tokens = Staged(device, num_values, manifest.token_dtype)
        self._scales = (
            Staged(device, max_pairs * sizes.num_tokens, "float16")
            if manifest.token_dtype == "int8"
            else None
        )
        self._scores = Staged(device, max_pairs, "float32")
        self.started = device.event()
        self.finished = device.event()

    def fill_text(self, queries: TokenizedQueries, planned: PlannedBatch) -> None:
        """Copy the ids of the batch's queries into the slot, padded with 0 to the bucket."""
        num_queries, bucket = len(planned.queries), planned.bucket
        width = min(bucket, queries.text_ids.shape[1])
        text_ids = self._text_ids.host(num_queries, bucket)
        text_ids[:, :width] = queries.text_ids[planned.queries, :width]
        text_ids[:, width:] = 0
        self._text_length.host(num_queries)[:] = queries.text_length[planned.queries]
        self._query_of_pair.host(len(planned.pairs))[:] = planned.query_of_pair

    def host_tokens(self, num_pairs: int) -> Array:
        """Return where the store writes: [P, m, H] of the engine's token dtype, pinned."""
        return self._tokens.host(num_pairs, *self._token_shape)

    def host_scales(self, num_pairs: int) -> Array | None:
        """Return where the store writes the scales: float16 [P, m], pinned; None without int8."""
        return None if self._scales is None else self._scales.host(num_pairs, self._token_shape[0])

    def host_scores(self, num_pairs: int) -> Array:
        """Return float32 [P], to be read once `finished` was passed."""
        return self._scores.host(num_pairs)

    def engine_batch(self, planned: PlannedBatch) -> Batch:
        """Return the batch as the engine sees it; views, no copy."""
        num_queries, num_pairs = len(planned.queries), len(planned.pairs)
        scales = self._scales
        return Batch(
            text_ids=self._text_ids.engine(num_queries, planned.bucket),
            text_length=self._text_length.engine(num_queries),
            query_of_pair=self._query_of_pair.engine(num_pairs),
            visual_tokens=self._tokens.engine(num_pairs, *self._token_shape),
            visual_scales=(
                None if scales is None else scales.engine(num_pairs, self._token_shape[0])
            ),
        )

    def engine_scores(self, num_pairs: int) -> Array:
        """Return float32 [P] where the engine writes."""
        return self._scores.engine(num_pairs)

    def upload(self, stream: Stream, planned: PlannedBatch) -> None:
        """Copy what was filled to the device, in the order of `stream`."""
        num_queries, num_pairs = len(planned.queries), len(planned.pairs)
        self._text_ids.upload(stream, num_queries * planned.bucket)
        self._text_length.upload(stream, num_queries)
        self._query_of_pair.upload(stream, num_pairs)
        num_tokens, hidden = self._token_shape
        self._tokens.upload(stream, num_pairs * num_tokens * hidden)
        if self._scales is not None:
            self._scales.upload(stream, num_pairs * num_tokens)

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
        self._queue: deque[_Ticket] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def try_take(self) -> Slot | None:
        """Return a free slot, or None when there is none or others wait for one.

        Raises:
            EngineError: the ring was closed.
        """
        with self._lock:
            self._check_open()
            return self._free.popleft() if self._free and not self._queue else None

    def take(self) -> Slot:
        """Return a slot, waiting in line for it. A caller that holds slots must not wait here.

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
            ticket.served.wait()
        except BaseException:  # an interrupted wait must not lose a slot
            self._leave(ticket)
            raise
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
