"""A slot's tokens where a pool keeps some: row numbers travel, and what the pool lacks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engines.int8_tokens import not_finite
from ..device.protocol import Device, Stream
from ..slot_tokens import NONE, Gathered, Staged, StagedRecords
from ..store import BadRecord
from ..token_source import TokenSource
from .resident_map import NOWHERE
from .token_pool import Records, TokenPool, record_memory

Array = npt.NDArray[Any]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

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
