"""The map over random histories, against a plain account of who holds what."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from edje.runtime.pool import NOWHERE, ResidentMap

KNOWN = np.arange(0, 60, 2)  # odd rows are known to nobody
ROWS = st.lists(st.integers(-1, 61), max_size=12, unique=True).map(lambda r: np.array(r, np.int64))


class Histories(RuleBasedStateMachine):
    """Tickets stay open and places taken across other calls, as with batches in flight."""

    tickets, taken = Bundle("tickets"), Bundle("taken")

    def __init__(self) -> None:
        super().__init__()
        self.map = ResidentMap(KNOWN, 9)
        self.held: dict[int, int] = {}  # row -> place, as far as nobody has driven it out
        self.pinned: dict[int, list[tuple[int, int]]] = {}
        self.owned: list[int] = []

    def look(self, rows: np.ndarray) -> np.ndarray:
        found = self.map.find(rows)
        self.map.let_go(found.ticket)
        return found.places

    @rule(target=tickets, rows=ROWS)
    def find(self, rows: np.ndarray) -> int:
        ticket, places = self.map.find(rows)
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            assert place == NOWHERE or self.held.get(row) == place
        pairs = zip(rows.tolist(), places.tolist(), strict=True)
        self.pinned[ticket] = [(row, place) for row, place in pairs if place != NOWHERE]
        return ticket

    @rule(ticket=consumes(tickets))
    def let_go(self, ticket: int) -> None:
        self.map.let_go(ticket)
        self.map.let_go(ticket)
        del self.pinned[ticket]

    @rule(target=taken, rows=ROWS)
    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        before = self.look(rows)
        places = self.map.take(rows)
        got = places != NOWHERE
        assert not (got & (before != NOWHERE)).any(), "a held row was given a second place"
        assert np.isin(rows[got], KNOWN).all()
        self.owned += places[got].tolist()
        return rows[got], places[got]

    @rule(batch=consumes(taken))
    def publish(self, batch: tuple[np.ndarray, np.ndarray]) -> None:
        rows, places = batch
        before = self.look(rows)
        self.map.publish(rows, places)
        self.disown(places)
        for row, place, old in zip(rows.tolist(), places, before, strict=True):
            self.held[row] = int(place if old == NOWHERE else old)

    @rule(batch=consumes(taken))
    def give_back(self, batch: tuple[np.ndarray, np.ndarray]) -> None:
        self.map.give_back(batch[1])
        self.disown(batch[1])

    def disown(self, places: np.ndarray) -> None:
        for place in places.tolist():
            self.owned.remove(place)

    @invariant()
    def no_place_is_given_twice(self) -> None:
        found = self.map._place_of[self.map._place_of != NOWHERE].tolist()
        everywhere = [*found, *self.owned, *self.map._empty[: self.map._num_empty].tolist()]
        assert sorted(everywhere) == list(range(self.map.capacity))

    @invariant()
    def an_open_ticket_keeps_its_places(self) -> None:
        for row, place in (pair for pairs in self.pinned.values() for pair in pairs):
            assert self.map._place_of[KNOWN.tolist().index(row)] == place

    @invariant()
    def rows_and_places_point_at_each_other(self) -> None:
        for number in np.flatnonzero(self.map._place_of[:-1] != NOWHERE).tolist():
            assert self.map._number_at[self.map._place_of[number]] == number
        assert len(self.map) == np.count_nonzero(self.map._place_of != NOWHERE)


Histories.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase


def bring_in(held: ResidentMap, rows: np.ndarray) -> None:
    """Ask for rows as a batch does, and keep those that were not held."""
    ticket, places = held.find(rows)
    lacking = rows[places == NOWHERE]
    taken = held.take(lacking)
    held.let_go(ticket)
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
    assert held.find(np.arange(3)).places.tolist() == [NOWHERE] * 3
    assert held.take(np.arange(3)).tolist() == [NOWHERE] * 3
