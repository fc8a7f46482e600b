"""Tokens that stay in a GPU's memory: what is held there, the memory, and a slot's way to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from ..arrays import Array, Int32, Int64
from ..engines.contract import Engine
from ..errors import EngineError, RequestError
from ..kernels.device.contract import Device, Stream
from ..kernels.launch import KernelLibrary
from ..kernels.records import GatherTokens, ScatterTokens
from ..tokens import not_finite
from .residency import Residency
from .resident_map import NOWHERE, ResidentMap
from .slot import NO_PAIRS, NONE_UNUSABLE, Staged, StagedRecords, Unusable
from .source import TokenSource, record_bytes
from .store import BadRecord, TokenStore

Policy = Literal["all", "listed", "recent"]

# The rest is for what engines allocate when they first meet a text bucket.
SHARE_OF_FREE_BYTES = 0.8

_POLICIES = {
    "all": "every image",
    "listed": "the images of the given list",
    "recent": "the images asked for last, as many as fit",
}
_NO_POSITIONS: Int32 = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """What a pool is for.

    Attributes:
        policy: `all` or `listed` (loaded ahead, nothing else comes in), or `recent`.
        capacity: records there is room for.
        ahead: int64: rows to load before the first request.
        num_images: images of the store.
        shape, dtype: (m, H) of a record, as the engine reads it.
    """

    policy: Policy
    capacity: int
    ahead: Int64
    num_images: int
    shape: tuple[int, int]
    dtype: str

    def residency(self, reason: str, pairs_per_s: Mapping[str, float] | None = None) -> Residency:
        """Return it as callers are told."""
        num_bytes = self.capacity * record_bytes(self.shape, self.dtype)
        says = f"{reason}; {_POLICIES[self.policy]}"
        return Residency("device", self.policy, self.capacity, num_bytes, says, pairs_per_s or {})

    def make_pool(
        self, device: Device, rows: Int64, capacity: int, *, checks_finite: bool
    ) -> TokenPool:
        """Allocate a pool for these records; see `TokenPool`.

        Raises:
            EngineError: the device runs no kernels, or has not so much memory.
        """
        return TokenPool(
            device,
            rows,
            capacity,
            shape=self.shape,
            dtype=self.dtype,
            checks_finite=checks_finite,
        )


def plan_pool(
    engine: Engine,
    store: TokenStore,
    device: Device,
    *,
    max_bytes: int | None,
    ids: Iterable[str] | None,
    num_slots: int,
) -> PoolPlan:
    """Decide what a pool on `device` holds of `store`, beside what the slots will take.

    Args:
        max_bytes: device memory that it may take; None: most of what is free.
        ids: the images to hold; None: all, or those asked for last.
        num_slots: slots of all pipelines: each takes fresh records, and the engine's input.

    Raises:
        EngineError: the device has no memory of its own.
        RequestError: no room for one record, or not for all that the caller listed; or ids that
            the store does not hold.
    """
    pool_capability(device)
    manifest = engine.manifest
    shape = manifest.bundle.sizes.num_tokens, manifest.bundle.sizes.hidden
    dtype, each = manifest.token_dtype, record_bytes(shape, manifest.token_dtype)
    if max_bytes is None:
        of_a_pair = each if engine.reads_rows else 2 * each  # gathered ones lie there twice
        spare = num_slots * manifest.profile.max_pairs * of_a_pair + engine.bytes_a_stream
        max_bytes = int((device.free_bytes() - spare) * SHARE_OF_FREE_BYTES)
    most, rows = max(0, max_bytes) // each, store.live_rows()
    listed = None if ids is None else np.unique(store.rows(ids))
    least = 1 if listed is None else len(listed)
    if most < least:
        raise RequestError(
            f"{least} images of {each:,} bytes need {least * each:,} bytes on {device.name}, "
            f"expected at most {max_bytes:,}",
            hint="give more max_bytes, list fewer ids, or build the engine with "
            "--tokens int8 for half the bytes",
        )
    if listed is not None:
        return PoolPlan("listed", len(listed), listed, len(rows), shape, dtype)
    if len(rows) <= most:
        return PoolPlan("all", len(rows), rows, len(rows), shape, dtype)
    return PoolPlan("recent", most, rows[:0], len(rows), shape, dtype)


class Records(NamedTuple):
    """Records on a device: tokens [N, m, H]; scales [N, m] where they are int8, else None."""

    tokens: Any
    scales: Any


class TokenPool:
    """Memory for `capacity` records on one device, and the map of what lies where.

    All its copies go through one compute stream, whose order keeps a record's arrival before its
    first use, and its last use before the arrival of the next one at its position.

    Attributes:
        map: which rows are held, and where.
        checks_finite: take no record in that holds NaN or infinity (some engine hides them).
    """

    def __init__(
        self,
        device: Device,
        rows: Int64,
        capacity: int,
        *,
        shape: tuple[int, int],
        dtype: str,
        checks_finite: bool,
    ):
        """Allocate the memory and load the kernels; the device stays the caller's.

        Args:
            rows: int64: every row that may be held, ascending.
            capacity: records there is room for.
            shape: (m, H) of a record.
            dtype: `float16`, or `int8` with scales.

        Raises:
            EngineError: the device runs no kernels, or has not so much memory.
        """
        capability = pool_capability(device)
        self.device = device
        self.map = ResidentMap(rows, capacity)
        self.checks_finite = checks_finite
        self.shape, self.dtype = shape, dtype
        with device.current():
            self._held = record_memory(device, capacity, shape, dtype)
            library = KernelLibrary(device, capability)
            self._gather = GatherTokens(library, token_dtype=dtype, row_dtype="int32")
            self._scatter = ScatterTokens(library, token_dtype=dtype, place_dtype="int32")

    def tokens_of_slot(self, max_pairs: int, *, by_row: bool = False) -> PooledTokens:
        """Allocate what one slot needs to bring batches of up to `max_pairs` together.

        Args:
            by_row: nothing is gathered: the engine reads the pool by row.
        """
        return PooledTokens(self, max_pairs, by_row=by_row)

    @property
    def held(self) -> Records:
        """The memory: `capacity` records."""
        return self._held

    def gather(self, positions: Any, out: Records, stream: Stream) -> None:
        """Copy the records at `positions` (int32 [P], -1: none) to their pairs, in stream order."""
        self.copy(self._held, positions, out, stream)

    def copy(self, records: Records, positions: Any, out: Records, stream: Stream) -> None:
        """As `gather`, from other records on the device."""
        scales = {"scales": records.scales, "out_scales": out.scales}
        self._gather.enqueue(records.tokens, positions, out.tokens, stream=stream, **scales)

    def scatter(self, records: Records, positions: Any, stream: Stream) -> None:
        """Copy records into the pool at `positions` (int32 [N], -1: none), in stream order."""
        scales = {"scales": records.scales, "pool_scales": self._held.scales}
        self._scatter.enqueue(records.tokens, positions, self._held.tokens, stream=stream, **scales)


def pool_capability(device: Device) -> tuple[int, int]:
    """Return the compute capability of a device that can keep a pool.

    Raises:
        EngineError: it has no memory of its own.
    """
    if device.compute_capability is None:
        raise EngineError(
            f"the device {device.name} has no memory of its own to keep tokens in",
            hint="the residency `host` keeps them in this machine's memory",
        )
    return device.compute_capability


def record_memory(device: Device, num_records: int, shape: tuple[int, int], dtype: str) -> Records:
    """Allocate device memory for records of (m, H) values."""
    num_tokens, hidden = shape
    tokens = device.memory(num_records * num_tokens * hidden, np.dtype(dtype))
    view = tokens.view((num_records, num_tokens, hidden))
    if dtype != "int8":
        return Records(view, None)
    scales = device.memory(num_records * num_tokens, np.dtype("float16"))
    return Records(view, scales.view((num_records, num_tokens)))


class PooledTokens:
    """One slot's batch: held records are copied on the device, the others come from the store.

    A record that several pairs of the batch ask for is read and uploaded once. What was uploaded
    sound is kept in the pool, if the pool takes it in. An engine that reads by row is told where
    each pair's record lies instead, and nothing is copied for it.

    Attributes:
        num_hits, num_misses: pairs of the batch that the pool held, and that it lacked.
    """

    def __init__(self, pool: TokenPool, max_pairs: int, *, by_row: bool = False):
        self._pool, self._by_row, device = pool, by_row, pool.device
        self._fresh = StagedRecords(device, max_pairs, pool.shape, pool.dtype)
        if not by_row:
            self._input = record_memory(device, max_pairs, pool.shape, pool.dtype)
        self._all_fresh = Records(*self._fresh.engine(max_pairs))
        # For each pair its position in the pool (by row: or behind it, among the fresh records)
        # and among the fresh records, and for each fresh record its position in the pool: -1 is
        # none.
        self._held = Staged(device, max_pairs, "int32")
        self._asked = Staged(device, max_pairs, "int32")
        self._kept = Staged(device, max_pairs, "int32")
        self._ticket = self._num_pairs = self.num_hits = self.num_misses = 0
        self._fresh_rows, self._sound = NO_PAIRS, np.empty(0, np.bool_)
        self._taken = _NO_POSITIONS

    def read(self, source: TokenSource, rows: Int64, *, check_finite: bool) -> Unusable:
        """Read those of `rows` (int64 [P]) that the pool lacks, each once, into pinned memory."""
        self._ticket, positions = self._pool.map.look_up(rows)
        self._num_pairs = len(rows)
        lacking = np.flatnonzero(positions == NOWHERE)
        self.num_hits, self.num_misses = len(rows) - len(lacking), len(lacking)
        self._held.host(len(rows))[:] = positions
        self._fresh_rows = NO_PAIRS
        if not len(lacking):
            return NONE_UNUSABLE
        self._fresh_rows, asked = np.unique(rows[lacking], return_inverse=True)
        if self._by_row:
            self._held.host(len(rows))[lacking] = self._pool.map.capacity + asked
        else:
            asked_of_pair = self._asked.host(len(rows))
            asked_of_pair[:] = NOWHERE
            asked_of_pair[lacking] = asked
        return self._read_fresh(source, check_finite or self._pool.checks_finite, asked, lacking)

    def upload(self, stream: Stream) -> None:
        """Copy positions and fresh records to the device, in the order of `stream`."""
        if self.num_hits or self._by_row:
            self._held.upload(stream, self._num_pairs)
        num_fresh = len(self._fresh_rows)
        if num_fresh:
            self._take_positions()
            if not self._by_row:
                self._asked.upload(stream, self._num_pairs)
            self._kept.upload(stream, num_fresh)
            self._fresh.upload(stream, num_fresh)

    def assemble(self, stream: Stream) -> None:
        """Gather the batch's tokens where the engine reads them, in the order of `stream`."""
        if not self._by_row:
            self._gather(stream)
        num_fresh = len(self._fresh_rows)
        if (self._taken != NOWHERE).any():
            fresh = Records(*self._fresh.engine(num_fresh))
            self._pool.scatter(fresh, self._kept.engine(num_fresh), stream)
        self._pool.map.release(self._ticket)  # from here on the stream's order keeps them

    def host(self, num_pairs: int) -> tuple[Array, Array | None]:
        """Return no records: those of a whole batch never lie on the host."""
        return np.empty((0, *self._pool.shape), self._pool.dtype), None

    def in_batch(self, num_pairs: int) -> tuple[Any, ...]:
        """Return the fields of `Batch` from its tokens on, as the engine sees them; no copy."""
        if self._by_row:
            return *self._pool.held, self._held.engine(num_pairs), self._all_fresh
        tokens, scales = self._input
        return tokens[:num_pairs], None if scales is None else scales[:num_pairs]

    def keep(self) -> None:
        """Let what was uploaded be found: its batch has come back, so all of it is sound."""
        kept = self._taken != NOWHERE
        self._pool.map.publish(self._fresh_rows[kept], self._taken[kept])
        self._taken = _NO_POSITIONS

    def release(self) -> None:
        """Give up what the batch held; no stream works on it any more. May be called twice."""
        self._pool.map.release(self._ticket)
        self._pool.map.free(self._taken[self._taken != NOWHERE])
        self._taken = _NO_POSITIONS

    def _gather(self, stream: Stream) -> None:
        """Bring the pool's records and the fresh ones together."""
        out, num_fresh = Records(*self.in_batch(self._num_pairs)), len(self._fresh_rows)
        if self.num_hits:
            self._pool.gather(self._held.engine(self._num_pairs), out, stream)
        if num_fresh:
            fresh = Records(*self._fresh.engine(num_fresh))
            self._pool.copy(fresh, self._asked.engine(self._num_pairs), out, stream)

    def _read_fresh(
        self, source: TokenSource, check_finite: bool, asked: Int64, lacking: Int64
    ) -> Unusable:
        """Read the fresh records; say which pairs cannot be scored by them."""
        tokens, scales = self._fresh.host(len(self._fresh_rows))
        bad = source.read(self._fresh_rows, tokens, scales, bad="mark")
        broken = not_finite(tokens, scales) if check_finite else NO_PAIRS
        self._sound = np.ones(len(self._fresh_rows), np.bool_)
        self._sound[[record.position for record in bad]] = False
        self._sound[broken] = False
        if self._sound.all():
            return NONE_UNUSABLE
        damaged: list[BadRecord] = [
            replace(record, position=int(pair))
            for record in bad
            for pair in lacking[asked == record.position]
        ]
        return Unusable(damaged, lacking[np.isin(asked, broken)])

    def _take_positions(self) -> None:
        """Take positions in the pool for the fresh records that are sound."""
        kept = self._kept.host(len(self._fresh_rows))
        kept[:] = NOWHERE
        kept[self._sound] = self._pool.map.take(self._fresh_rows[self._sound])
        self._taken = kept.copy()
