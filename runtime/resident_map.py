"""Which records lie where in a pool, and which of them make room for others."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from ..arrays import Int32, Int64

NOWHERE = -1
# Positions looked at for each one needed: the least recently used of these go. More come closer to
# the least recently used of all; 8 are found in microseconds.
LOOKED_AT = 8


class Held(NamedTuple):
    """Where rows lie.

    Attributes:
        ticket: keeps these positions as they are until it is given back by `release`.
        positions: int32 [N]: position of each row, -1 for rows that are not held.
    """

    ticket: int
    positions: Int32


class MapUsage(NamedTuple):
    """Positions that hold a row, that are empty, and tickets that nobody gave back yet."""

    num_held: int
    num_empty: int
    num_tickets: int


class ResidentMap:
    """Rows at positions, for any number of threads. About 12 bytes a row of the store."""

    def __init__(self, rows: Int64, capacity: int):
        """Know `rows` (int64, ascending, none twice); hold none of them yet.

        Args:
            rows: all that may ever be held; others are never found and never taken in.
            capacity: how many positions there are.
        """
        self.capacity = capacity
        self._rows = rows
        # One more: index -1, for rows that nobody knows, finds nothing.
        self._position_of = np.full(len(rows) + 1, NOWHERE, np.int32)
        self._number_at = np.full(capacity, NOWHERE, np.int64)  # index into `rows`
        self._used_by = np.zeros(capacity, np.int64)  # the last ticket that found it
        self._empty = np.arange(capacity - 1, -1, -1, dtype=np.int32)  # a stack
        self._num_empty = capacity
        self._hand = 0
        self._last_ticket = 0
        self._open_tickets: set[int] = set()
        self._lock = threading.Lock()
        self._takes_in = True

    def look_up(self, rows: Int64) -> Held:
        """Return where `rows` lie, and keep them there until the ticket is given back."""
        numbers = self._numbers(rows)
        with self._lock:
            self._last_ticket += 1
            self._open_tickets.add(self._last_ticket)
            positions = self._position_of[numbers]
            self._used_by[positions[positions != NOWHERE]] = self._last_ticket
            return Held(self._last_ticket, positions)

    def release(self, ticket: int) -> None:
        """Allow that the positions of a ticket are given to others. May be called twice."""
        with self._lock:
            self._open_tickets.discard(ticket)

    def missing(self, rows: Int64) -> Int64:
        """Return those of `rows` that are not held now; keeps nothing."""
        numbers = self._numbers(rows)
        with self._lock:
            is_missing = self._position_of[numbers] == NOWHERE
        missing: Int64 = rows[is_missing]
        return missing

    def take(self, rows: Int64) -> Int32:
        """Take a position for each row that is to be held, evicting the least recently used.

        Args:
            rows: int64 [N], none twice.

        Returns:
            int32 [N]: a position that is the caller's until `publish` or `free`; -1 where none
            can be had, the row is held already, or nothing more is taken in.
        """
        positions = np.full(len(rows), NOWHERE, np.int32)
        numbers = self._numbers(rows)
        with self._lock:
            if self._takes_in:
                wanted = np.flatnonzero((numbers >= 0) & (self._position_of[numbers] == NOWHERE))
                got = self._take_positions(len(wanted))
                positions[wanted[: len(got)]] = got
        return positions

    def publish(self, rows: Int64, positions: Int32) -> None:
        """Let `rows` be found at `positions`, which `take` gave and which are filled by now.

        A row that somebody else brought in meanwhile keeps its position there.
        """
        numbers = self._numbers(rows)
        with self._lock:
            is_new = self._position_of[numbers] == NOWHERE
            self._push(positions[~is_new])
            numbers, positions = numbers[is_new], positions[is_new]
            self._position_of[numbers] = positions
            self._number_at[positions] = numbers
            self._used_by[positions] = self._last_ticket

    def free(self, positions: Int32) -> None:
        """Return positions of `take` that were not filled."""
        with self._lock:
            self._push(positions)

    def freeze(self) -> None:
        """Take nothing more in: what is held stays for good."""
        self._takes_in = False

    def usage(self) -> MapUsage:
        """Return how the positions are used now."""
        with self._lock:
            return MapUsage(len(self), self._num_empty, len(self._open_tickets))

    def __len__(self) -> int:
        """How many rows can be found."""
        return int(np.count_nonzero(self._number_at != NOWHERE))

    def _numbers(self, rows: Int64) -> Int64:
        """Return int64 [N]: index of each row among those known, -1 for others."""
        if not len(self._rows):
            return np.full(len(rows), NOWHERE, np.int64)
        at = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        return np.where(self._rows[at] == rows, at, NOWHERE)

    def _take_positions(self, count: int) -> Int32:
        """Return up to `count` positions that nobody needs, empty ones first."""
        num_pops = min(count, self._num_empty)
        self._num_empty -= num_pops
        taken: Int32 = self._empty[self._num_empty : self._num_empty + num_pops][::-1].copy()
        if num_pops == count:
            return taken
        evicted = self._evict(count - num_pops)
        return np.concatenate([taken, evicted])

    def _evict(self, count: int) -> Int32:
        """Empty up to `count` positions: the least recently used of those under the hand."""
        span = min(self.capacity, count * LOOKED_AT)
        under = ((self._hand + np.arange(span)) % self.capacity).astype(np.int32)
        self._hand = (self._hand + span) % self.capacity
        oldest_open = min(self._open_tickets, default=self._last_ticket + 1)
        is_idle = (self._number_at[under] != NOWHERE) & (self._used_by[under] < oldest_open)
        idle: Int32 = under[is_idle]
        if len(idle) > count:
            idle = idle[np.argpartition(self._used_by[idle], count)[:count]]
        self._position_of[self._number_at[idle]] = NOWHERE
        self._number_at[idle] = NOWHERE
        return idle

    def _push(self, positions: Int32) -> None:
        self._empty[self._num_empty : self._num_empty + len(positions)] = positions
        self._num_empty += len(positions)
