"""Tokens that stay in a GPU's memory: which row lies where, and the memory itself."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Int32, Int64
from ..errors import EngineError
from ..kernels.device.contract import Device, Stream
from ..kernels.launch import KernelLibrary
from ..kernels.records import GatherTokens, ScatterTokens

NOWHERE = -1
# Places looked at for each one needed: the least recently used of these go. More come closer to
# the least recently used of all; 8 are found in microseconds.
LOOKED_AT = 8


class Found(NamedTuple):
    """Where rows lie.

    Attributes:
        ticket: keeps these places as they are until it is given back by `let_go`.
        places: int32 [N]: place of each row, -1 for rows that are not held.
    """

    ticket: int
    places: Int32


class ResidentMap:
    """Rows at places, for any number of threads. About 12 bytes a row of the store."""

    def __init__(self, rows: Int64, capacity: int):
        """Know `rows` (int64, ascending, none twice); hold none of them yet.

        Args:
            rows: all that may ever be held; others are never found and never taken in.
            capacity: how many places there are.
        """
        self.capacity = capacity
        self._rows = rows
        # One more: index -1, for rows that nobody knows, finds nothing.
        self._place_of = np.full(len(rows) + 1, NOWHERE, np.int32)
        self._number_at = np.full(capacity, NOWHERE, np.int64)  # index into `rows`
        self._used_by = np.zeros(capacity, np.int64)  # the last ticket that found it
        self._empty = np.arange(capacity - 1, -1, -1, dtype=np.int32)  # a stack
        self._num_empty = capacity
        self._hand = 0
        self._last_ticket = 0
        self._open_tickets: set[int] = set()
        self._lock = threading.Lock()
        self._takes_in = True

    def find(self, rows: Int64) -> Found:
        """Return where `rows` lie, and keep them there until the ticket is given back."""
        numbers = self._numbers(rows)
        with self._lock:
            self._last_ticket += 1
            self._open_tickets.add(self._last_ticket)
            places = self._place_of[numbers]
            self._used_by[places[places != NOWHERE]] = self._last_ticket
            return Found(self._last_ticket, places)

    def let_go(self, ticket: int) -> None:
        """Allow that the places of a ticket are given to others. May be called twice."""
        with self._lock:
            self._open_tickets.discard(ticket)

    def missing(self, rows: Int64) -> Int64:
        """Return those of `rows` that are not held now; keeps nothing."""
        numbers = self._numbers(rows)
        with self._lock:
            is_missing = self._place_of[numbers] == NOWHERE
        found: Int64 = rows[is_missing]
        return found

    def take(self, rows: Int64) -> Int32:
        """Take a place for each row that is to be held, driving out the least recently used.

        Args:
            rows: int64 [N], none twice.

        Returns:
            int32 [N]: a place that is the caller's until `publish` or `give_back`; -1 where none
            can be had, the row is held already, or nothing more is taken in.
        """
        places = np.full(len(rows), NOWHERE, np.int32)
        numbers = self._numbers(rows)
        with self._lock:
            if self._takes_in:
                wanted = np.flatnonzero((numbers >= 0) & (self._place_of[numbers] == NOWHERE))
                got = self._take_places(len(wanted))
                places[wanted[: len(got)]] = got
        return places

    def publish(self, rows: Int64, places: Int32) -> None:
        """Let `rows` be found at `places`, which `take` gave and which are filled by now.

        A row that somebody else brought in meanwhile keeps its place there.
        """
        numbers = self._numbers(rows)
        with self._lock:
            is_new = self._place_of[numbers] == NOWHERE
            self._push(places[~is_new])
            numbers, places = numbers[is_new], places[is_new]
            self._place_of[numbers] = places
            self._number_at[places] = numbers
            self._used_by[places] = self._last_ticket

    def give_back(self, places: Int32) -> None:
        """Return places of `take` that were not filled."""
        with self._lock:
            self._push(places)

    def freeze(self) -> None:
        """Take nothing more in: what is held stays for good."""
        self._takes_in = False

    def __len__(self) -> int:
        """How many rows can be found."""
        return int(np.count_nonzero(self._number_at != NOWHERE))

    def _numbers(self, rows: Int64) -> Int64:
        """Return int64 [N]: index of each row among those known, -1 for others."""
        if not len(self._rows):
            return np.full(len(rows), NOWHERE, np.int64)
        at = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        return np.where(self._rows[at] == rows, at, NOWHERE)

    def _take_places(self, count: int) -> Int32:
        """Return up to `count` places that nobody needs, empty ones first."""
        num_pops = min(count, self._num_empty)
        self._num_empty -= num_pops
        taken: Int32 = self._empty[self._num_empty : self._num_empty + num_pops][::-1].copy()
        if num_pops == count:
            return taken
        driven_out = self._drive_out(count - num_pops)
        return np.concatenate([taken, driven_out])

    def _drive_out(self, count: int) -> Int32:
        """Empty up to `count` places: the least recently used of those under the hand."""
        span = min(self.capacity, count * LOOKED_AT)
        under = ((self._hand + np.arange(span)) % self.capacity).astype(np.int32)
        self._hand = (self._hand + span) % self.capacity
        oldest_open = min(self._open_tickets, default=self._last_ticket + 1)
        is_idle = (self._number_at[under] != NOWHERE) & (self._used_by[under] < oldest_open)
        idle: Int32 = under[is_idle]
        if len(idle) > count:
            idle = idle[np.argpartition(self._used_by[idle], count)[:count]]
        self._place_of[self._number_at[idle]] = NOWHERE
        self._number_at[idle] = NOWHERE
        return idle

    def _push(self, places: Int32) -> None:
        self._empty[self._num_empty : self._num_empty + len(places)] = places
        self._num_empty += len(places)


class Records(NamedTuple):
    """Records on a device: tokens [N, m, H]; scales [N, m] where they are int8, else None."""

    tokens: Any
    scales: Any


class TokenPool:
    """Memory for `capacity` records on one device, and the map of what lies where.

    All its copies go through one compute stream, whose order keeps a record's arrival before its
    first use, and its last use before the arrival of the next one at its place.

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
        self.map = ResidentMap(rows, capacity)
        self.checks_finite = checks_finite
        self.shape, self.dtype = shape, dtype
        with device.current():
            self._held = record_memory(device, capacity, shape, dtype)
            library = KernelLibrary(device, capability)
            self._gather = GatherTokens(library, token_dtype=dtype, row_dtype="int32")
            self._scatter = ScatterTokens(library, token_dtype=dtype, place_dtype="int32")

    def gather(self, places: Any, out: Records, stream: Stream) -> None:
        """Copy the records at `places` (int32 [P], -1: none) to their pairs, in stream order."""
        self.copy(self._held, places, out, stream)

    def copy(self, records: Records, places: Any, out: Records, stream: Stream) -> None:
        """As `gather`, from other records on the device."""
        scales = {"scales": records.scales, "out_scales": out.scales}
        self._gather.enqueue(records.tokens, places, out.tokens, stream=stream, **scales)

    def scatter(self, records: Records, places: Any, stream: Stream) -> None:
        """Copy records into the pool at `places` (int32 [N], -1: not at all), in stream order."""
        scales = {"scales": records.scales, "pool_scales": self._held.scales}
        self._scatter.enqueue(records.tokens, places, self._held.tokens, stream=stream, **scales)


def pool_capability(device: Device) -> tuple[int, int]:
    """Return the compute capability of a device that can keep a pool.

    Raises:
        EngineError: it has no memory of its own.
    """
    if device.compute_capability is None:
        raise EngineError(
            f"the device {device.name} has no memory of its own to keep tokens in",
            hint='residency="host" keeps them in this machine\'s memory',
        )
    return device.compute_capability


def record_bytes(shape: tuple[int, int], dtype: str) -> int:
    """Return the bytes of one record of (m, H) values, its scales included."""
    num_tokens, hidden = shape
    scale_bytes = 2 * num_tokens if dtype == "int8" else 0
    return num_tokens * hidden * np.dtype(dtype).itemsize + scale_bytes


def record_memory(device: Device, num_records: int, shape: tuple[int, int], dtype: str) -> Records:
    """Allocate device memory for records of (m, H) values."""
    num_tokens, hidden = shape
    tokens = device.memory(num_records * num_tokens * hidden, np.dtype(dtype))
    view = tokens.view((num_records, num_tokens, hidden))
    if dtype != "int8":
        return Records(view, None)
    scales = device.memory(num_records * num_tokens, np.dtype("float16"))
    return Records(view, scales.view((num_records, num_tokens)))
