"""The map over random histories, against a plain account of who holds what."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from edje.runtime.resident_map import NOWHERE, ResidentMap

KNOWN = np.arange(0, 60, 2)  # odd rows are known to nobody
ROWS = st.lists(st.integers(-1, 61), max_size=12, unique=True).map(lambda r: np.array(r, np.int64))


class Histories(RuleBasedStateMachine):
    """Tickets stay open and positions taken across other calls, as with batches in flight."""

    tickets, taken = Bundle("tickets"), Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.map = ResidentMap(KNOWN, 9)
        self.held: dict[int, int] = {}  # row -> position, as far as nobody has driven it out
        self.pinned: dict[int, list[tuple[int, int]]] = {}
        self.owned: list[int] = []

    def look(self, rows: np.ndarray) -> np.ndarray:
        found = self.map.look_up(rows)
        self.map.release(found.ticket)
        return found.positions

    @rule(target=tickets, rows=ROWS)
    def look_up(self, rows: np.ndarray) -> int:
        ticket, positions = self.map.look_up(rows)
        for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
            assert position == NOWHERE or self.held.get(row) == position
        pairs = zip(rows.tolist(), positions.tolist(), strict=True)
        self.pinned[ticket] = [(row, position) for row, position in pairs if position != NOWHERE]
        return ticket

    @rule(ticket=consumes(tickets))
    def release(self, ticket: int) -> None:
        self.map.release(ticket)
        self.map.release(ticket)
        del self.pinned[ticket]

    @rule(target=taken, rows=ROWS)
    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        before = self.look(rows)
        positions = self.map.take(rows)
        got = positions != NOWHERE
        assert not (got & (before != NOWHERE)).any(), "a held row was given a second position"
        assert np.isin(rows[got], KNOWN).all()
        self.owned += positions[got].tolist()
        return rows[got], positions[got]

    @rule(batch=consumes(taken))
    def publish(self, batch: tuple[np.ndarray, np.ndarray]) -> None:
        rows, positions = batch
        before = self.look(rows)
        self.map.publish(rows, positions)
        self.disown(positions)
        for row, position, old in zip(rows.tolist(), positions, before, strict=True):
            self.held[row] = int(position if old == NOWHERE else old)

    @rule(batch=consumes(taken))
    def free(self, batch: tuple[np.ndarray, np.ndarray]) -> None:
        self.map.free(batch[1])
        self.disown(batch[1])

    def disown(self, positions: np.ndarray) -> None:
        for position in positions.tolist():
            self.owned.remove(position)

    def positions_held(self) -> dict[int, int]:
        """Return row -> position of what was published and is not missing yet."""
        missing = set(self.map.missing(KNOWN).tolist())
        held = {row: at for row, at in self.held.items() if row not in missing}
        assert len(held) == len(KNOWN) - len(missing), "a row is held that nobody published"
        return held

    @invariant()
    def no_position_is_given_twice(self) -> None:
        somewhere = [*self.positions_held().values(), *self.owned]
        assert len(set(somewhere)) == len(somewhere)
        assert set(somewhere) <= set(range(self.map.capacity))
        used = self.map.usage()
        assert used.num_held + len(self.owned) + used.num_empty == self.map.capacity

    @invariant()
    def an_open_ticket_keeps_its_positions(self) -> None:
        held = self.positions_held()
        for row, position in (pair for pairs in self.pinned.values() for pair in pairs):
            assert held[row] == position
        assert self.map.usage().num_tickets == len(self.pinned)

    @invariant()
    def as_many_are_held_as_can_be_found(self) -> None:
        assert len(self.map) == self.map.usage().num_held == len(self.positions_held())


Histories.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase


def bring_in(held: ResidentMap, rows: np.ndarray) -> None:
    """Ask for rows as a batch does, and keep those that were not held."""
    ticket, positions = held.look_up(rows)
    lacking = rows[positions == NOWHERE]
    taken = held.take(lacking)
    held.release(ticket)
    kept = taken != NOWHERE
    held.publish(lacking[kept], taken[kept])


def test_the_least_recently_used_go_first() -> None:
    rows = np.arange(10_000)
    held = ResidentMap(rows, 1000)
    old, fresh = rows[:500], rows[500:1000]
    bring_in(held, old)
    bring_in(held, fresh)
    for start, stop in pairwise(range(1000, 1401, 100)):  # 400 newcomers
        bring_in(held, rows[start:stop])
        bring_in(held, fresh)
    assert len(held.missing(fresh)) == 0
    assert len(held.missing(old)) == 400


class ExactLru:
    """The least recently used row goes, whatever finding it costs."""

    def __init__(self, capacity: int):
        self._capacity, self._rows = capacity, OrderedDict[int, None]()

    def num_found(self, rows: list[int]) -> int:
        """Return how many of `rows` are held, and bring in the others."""
        found = [row for row in rows if row in self._rows]
        for row in rows:
            self._rows[row] = None
            self._rows.move_to_end(row)
        while len(self._rows) > self._capacity:
            self._rows.popitem(last=False)
        return len(found)


def test_it_finds_as_much_as_an_exact_account_would() -> None:
    """As requests do: some images are asked for again and again, most only once."""
    rows, random = np.arange(100_000), np.random.default_rng(0)
    held, exact = ResidentMap(rows, 2000), ExactLru(2000)
    num_found = num_exact = 0
    for _ in range(400):
        asked = [random.integers(0, 1000, 128), random.integers(1000, 100_000, 128)]
        batch = np.unique(np.concatenate(asked))
        num_found += len(batch) - len(held.missing(batch))
        num_exact += exact.num_found(batch.tolist())
        bring_in(held, batch)
    assert num_exact > 20_000
    assert num_found > 0.97 * num_exact


def test_a_frozen_map_takes_nothing_in() -> None:
    held = ResidentMap(np.arange(10), 5)
    bring_in(held, np.arange(2))
    held.freeze()
    bring_in(held, np.arange(10))
    assert held.missing(np.arange(10)).tolist() == list(range(2, 10))


def test_an_empty_store_holds_nothing() -> None:
    held = ResidentMap(np.empty(0, np.int64), 4)
    assert held.look_up(np.arange(3)).positions.tolist() == [NOWHERE] * 3
    assert held.take(np.arange(3)).tolist() == [NOWHERE] * 3
