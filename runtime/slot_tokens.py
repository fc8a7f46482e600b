"""How a slot's tokens get to the engine: sent with the batch, or gathered from a pool."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np

from ..arrays import Array, Int32, Int64
from ..kernels.device.contract import Device, Stream
from ..tokens import not_finite
from .pool import NOWHERE, Records, TokenPool, record_memory
from .source import TokenSource
from .store import BadRecord

NONE: Int64 = np.empty(0, np.int64)


class Gathered(NamedTuple):
    """What a batch cannot be scored by.

    Attributes:
        damaged: records that could not be read; `position` is the pair's place in the batch.
        not_finite: int64: pairs whose tokens hold NaN or infinity, where that was looked for.
    """

    damaged: Sequence[BadRecord]
    not_finite: Int64


class SlotTokens(Protocol):
    """The tokens of one slot's batch; owned, as the slot, by who took the slot from the ring."""

    def gather(self, source: TokenSource, rows: Int64, *, check_finite: bool) -> Gathered:
        """Bring the records of `rows` (int64 [P]) into pinned memory, as far as they are needed."""
        ...

    def upload(self, stream: Stream) -> None:
        """Copy what was gathered to the device, in the order of `stream`."""
        ...

    def assemble(self, stream: Stream) -> None:
        """Put the batch's tokens together where the engine reads them, in the order of `stream`."""
        ...

    def engine(self, num_pairs: int) -> tuple[Array, Array | None]:
        """Return tokens [P, m, H] and scales [P, m] as the engine sees them; no copy."""
        ...

    def landed(self) -> None:
        """Take notice that the batch's scores have come back: all its copies are sound."""
        ...

    def let_go(self) -> None:
        """Give up what the batch held; no stream works on it any more. May be called twice."""
        ...


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

    def upload(self, stream: Stream, num_records: int) -> None:
        self._tokens.upload(stream, num_records * math.prod(self._shape))
        if self._scales is not None:
            self._scales.upload(stream, num_records * self._shape[0])


class StreamedTokens:
    """Every record comes from the store with every batch."""

    def __init__(self, device: Device, max_pairs: int, shape: tuple[int, int], dtype: str):
        self._records = StagedRecords(device, max_pairs, shape, dtype)
        self._num_pairs = 0

    def gather(self, source: TokenSource, rows: Int64, *, check_finite: bool) -> Gathered:
        self._num_pairs = len(rows)
        tokens, scales = self._records.host(len(rows))
        damaged = source.read(rows, tokens, scales, bad="mark")
        return Gathered(damaged, not_finite(tokens, scales) if check_finite else NONE)

    def upload(self, stream: Stream) -> None:
        self._records.upload(stream, self._num_pairs)

    def assemble(self, stream: Stream) -> None:
        """Nothing: the upload went where the engine reads."""

    def engine(self, num_pairs: int) -> tuple[Array, Array | None]:
        return self._records.engine(num_pairs)

    def landed(self) -> None:
        """Nothing was kept."""

    def let_go(self) -> None:
        """Nothing was held."""


_NO_PLACES: Int32 = np.empty(0, np.int32)


class PooledTokens:
    """One slot's way: held records are copied on the device, the others come from the store.

    A record that several pairs of the batch ask for is read and uploaded once. What was uploaded
    sound is kept in the pool, if the pool takes it in.
    """

    def __init__(self, device: Device, pool: TokenPool, max_pairs: int):
        self._pool = pool
        self._fresh = StagedRecords(device, max_pairs, pool.shape, pool.dtype)
        self._input = record_memory(device, max_pairs, pool.shape, pool.dtype)
        # For each pair its place in the pool and among the fresh records, and for each fresh
        # record its place in the pool: -1 is none.
        self._held = Staged(device, max_pairs, "int32")
        self._asked = Staged(device, max_pairs, "int32")
        self._kept = Staged(device, max_pairs, "int32")
        self._ticket = self._num_pairs = self._num_held = 0
        self._fresh_rows, self._sound = NONE, np.empty(0, np.bool_)
        self._taken = _NO_PLACES

    def gather(self, source: TokenSource, rows: Int64, *, check_finite: bool) -> Gathered:
        self._ticket, places = self._pool.map.find(rows)
        self._num_pairs = len(rows)
        lacking = np.flatnonzero(places == NOWHERE)
        self._num_held = len(rows) - len(lacking)
        self._held.host(len(rows))[:] = places
        self._fresh_rows, asked = np.unique(rows[lacking], return_inverse=True)
        if not len(lacking):
            return Gathered((), NONE)
        asked_of_pair = self._asked.host(len(rows))
        asked_of_pair[:] = NOWHERE
        asked_of_pair[lacking] = asked
        return self._read(source, check_finite or self._pool.checks_finite, asked, lacking)

    def upload(self, stream: Stream) -> None:
        if self._num_held:
            self._held.upload(stream, self._num_pairs)
        num_fresh = len(self._fresh_rows)
        if num_fresh:
            self._take_places()
            self._asked.upload(stream, self._num_pairs)
            self._kept.upload(stream, num_fresh)
            self._fresh.upload(stream, num_fresh)

    def assemble(self, stream: Stream) -> None:
        out = Records(*self.engine(self._num_pairs))
        if self._num_held:
            self._pool.gather(self._held.engine(self._num_pairs), out, stream)
        num_fresh = len(self._fresh_rows)
        if num_fresh:
            fresh = Records(*self._fresh.engine(num_fresh))
            self._pool.copy(fresh, self._asked.engine(self._num_pairs), out, stream)
            if (self._taken != NOWHERE).any():
                self._pool.scatter(fresh, self._kept.engine(num_fresh), stream)
        self._pool.map.let_go(self._ticket)  # from here on the stream's order keeps them

    def engine(self, num_pairs: int) -> tuple[Array, Array | None]:
        tokens, scales = self._input
        return tokens[:num_pairs], None if scales is None else scales[:num_pairs]

    def landed(self) -> None:
        kept = self._taken != NOWHERE
        self._pool.map.publish(self._fresh_rows[kept], self._taken[kept])
        self._taken = _NO_PLACES

    def let_go(self) -> None:
        self._pool.map.let_go(self._ticket)
        self._pool.map.give_back(self._taken[self._taken != NOWHERE])
        self._taken = _NO_PLACES

    def _read(
        self, source: TokenSource, check_finite: bool, asked: Int64, lacking: Int64
    ) -> Gathered:
        """Read the fresh records; say which pairs cannot be scored by them."""
        tokens, scales = self._fresh.host(len(self._fresh_rows))
        bad = source.read(self._fresh_rows, tokens, scales, bad="mark")
        broken = not_finite(tokens, scales) if check_finite else NONE
        self._sound = np.ones(len(self._fresh_rows), np.bool_)
        self._sound[[record.position for record in bad]] = False
        self._sound[broken] = False
        if self._sound.all():
            return Gathered((), NONE)
        damaged: list[BadRecord] = [
            replace(record, position=int(pair))
            for record in bad
            for pair in lacking[asked == record.position]
        ]
        return Gathered(damaged, lacking[np.isin(asked, broken)])

    def _take_places(self) -> None:
        """Take places in the pool for the fresh records that are sound."""
        kept = self._kept.host(len(self._fresh_rows))
        kept[:] = NOWHERE
        kept[self._sound] = self._pool.map.take(self._fresh_rows[self._sound])
        self._taken = kept.copy()
