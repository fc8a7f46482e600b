"""The records of a store in memory: id -> row handle -> what the record must hash to.

About 50 bytes a record. An id is known by its xxh3-128 digest: the low half is looked up in a
sorted table, through buckets of its leading bits, the high half confirms it. Two ids with one
digest are refused when the second is appended.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress, pairwise
from threading import Lock
from typing import NamedTuple

import numpy as np
import xxhash

from ...arrays import Int64, UInt64
from ...errors import RequestError, StoreError
from .format import ROW_BITS, ROW_MASK, is_id
from .records import BadRecord, ReadPlan, RecordBatch, Records
from .unlocked import find_ids, is_built, table_of

# Records appended since the last merge are found through a dict; past this they are merged.
MAX_FRESH = 1 << 16


class _Ids(NamedTuple):
    """The packed ids of `num_rows` records from `location` on."""

    location: int
    num_rows: int
    packed: bytes


class _Table:
    """Columns of all committed rows, one place a row, segment after segment.

    `segments` int64 [S + 1]: their numbers, ascending, and one larger than any; `edges` int64
    [S + 1]: place of each one's first row, and of the end. (No array is as long as a segment's
    number is large: a hostile catalog chooses it.)
    """

    def __init__(self, num_rows: Mapping[int, int]):
        used = sorted(segment for segment, count in num_rows.items() if count)
        self.segments = np.array([*used, 1 << (63 - ROW_BITS)], np.int64)
        self.edges: Int64 = np.cumsum([0, *(num_rows[segment] for segment in used)])
        stops = self.edges.tolist()
        self._rows = {each: slice(*stops[at : at + 2]) for at, each in enumerate(used)}
        total = stops[-1]
        self.lows = np.zeros(total, np.uint64)
        self.highs = np.zeros(total, np.uint64)
        self.checksums = np.zeros(total, np.uint64)
        self.live = np.zeros(total, np.bool_)
        self.ids: list[_Ids] = []

    def fill(self, batch: RecordBatch) -> None:
        """Put in the records of one batch, alive."""
        start = self.rows_of(batch.segment).start + batch.first_row
        places = slice(start, start + len(batch.records))
        digests = batch.records.digest_array()
        self.highs[places], self.lows[places] = digests[:, 0], digests[:, 1]
        self.checksums[places] = batch.records.checksum_array()
        self.live[places] = True
        packed = batch.records.packed_ids
        self.ids.append(_Ids(batch.first_location, len(batch.records), packed))

    def copy_from(self, old: _Table) -> None:
        """Take over every row of `old`, whose segments are all here and no longer."""
        for segment in old.segments[:-1].tolist():
            there = old.rows_of(segment)
            start = self.rows_of(segment).start
            here = slice(start, start + there.stop - there.start)
            for name in ("lows", "highs", "checksums", "live"):
                getattr(self, name)[here] = getattr(old, name)[there]
        self.ids += old.ids

    def rows_of(self, segment: int) -> slice:
        """Return the places of a segment's rows; none if it has none."""
        return self._rows.get(segment, slice(0, 0))

    def kill(self, locations: Int64) -> int:
        """Mark records as deleted; return how many of them are here."""
        places = self.places(locations)
        places = places[places >= 0]
        self.live[places] = False
        return len(places)

    def places(self, locations: Int64) -> Int64:
        """Return int64 [N] places of row handles; -1 for what was never given out."""
        segments, rows = locations >> ROW_BITS, locations & ROW_MASK
        at = np.searchsorted(self.segments[:-1], segments)
        places = self.edges[at] + rows
        stops = self.edges[np.minimum(at + 1, len(self.edges) - 1)]
        return np.where((self.segments[at] == segments) & (places < stops), places, -1)

    def ascending_places(self, locations: Int64) -> Int64:
        """Return `places` of one ascending row handle or more: one step if one segment has all.

        Raises:
            RequestError: row handles that were never given out.
        """
        first, last = locations.item(0), locations.item(-1)
        base = first >> ROW_BITS << ROW_BITS
        there = self.rows_of(first >> ROW_BITS)
        if last - base < there.stop - there.start:
            shifted: Int64 = locations + np.array(there.start - base)  # faster than with an int
            return shifted
        places = self.places(locations)
        foreign = locations[places < 0]
        if len(foreign):
            shown = foreign[:20].tolist()
            raise RequestError(f"{len(foreign)} rows are not of this store: {shown}")
        return places

    def locations(self, places: Int64) -> Int64:
        """Return int64 [N] row handles of places."""
        if len(self.segments) == 2:  # one segment, and the end
            alone: Int64 = places + np.array(self.segments.item(0) << ROW_BITS)
            return alone
        at = np.searchsorted(self.edges[1:], places, side="right")
        return (self.segments[at] << ROW_BITS) | (places - self.edges[at])

    def sort(self) -> None:
        """Make the lookup table of the live records; the order of ids becomes that of rows.

        Part by part: large arrays that live for a moment would stay with the process (malloc).
        """
        self.ids.sort(key=lambda entry: entry.location)
        self.num_live = int(np.count_nonzero(self.live))
        bits = max(1, min(24, self.num_live.bit_length()))
        self.shift = np.uint64(64 - bits)
        places = np.uint32 if len(self.live) < 1 << 32 else np.int64
        self.order = np.empty(self.num_live, places)
        # One more, larger than any: where a search that finds nothing ends.
        self.keys = np.full(self.num_live + 1, 2**64 - 1, np.uint64)
        self.buckets = np.empty((1 << bits) + 1, places)
        parts = min(1 << bits, max(1, self.num_live >> 16))
        edges = [(1 << bits) * part // parts for part in range(parts + 1)]
        done = 0
        for first, stop in pairwise(edges):
            done = self._sort_part(first, stop, done)
        self.buckets[-1] = self.num_live
        self._for_c = b""
        if is_built():
            shift = int(self.shift)
            self._for_c = table_of(
                self.buckets, self.keys, self.order, self.highs, self.live, shift
            )

    def _sort_part(self, first: int, stop: int, done: int) -> int:
        """Sort in the records of buckets [first, stop) behind `done` others; return all so far."""
        top = self.lows >= np.uint64(first) << self.shift
        if stop < len(self.buckets) - 1:
            top &= self.lows < np.uint64(stop) << self.shift
        top &= self.live
        places = np.flatnonzero(top)
        lows = self.lows[places]
        order = np.argsort(lows)
        keys = lows[order]
        self.order[done : done + len(keys)] = places[order]
        self.keys[done : done + len(keys)] = keys
        leading = np.arange(first, stop, dtype=np.uint64) << self.shift
        self.buckets[first:stop] = np.searchsorted(keys, leading) + done
        return done + len(keys)

    def find(self, ids: Sequence[str]) -> tuple[Int64, int]:
        """Return int64 [N] places of the live records with these ids, and how many there are.

        The place of an id that is not here is -1.

        Raises:
            TypeError: they are not strings.
        """
        if self._for_c:
            places, num_known = find_ids(ids if type(ids) is list else list(ids), self._for_c)
            return np.frombuffer(places, np.int64), num_known
        found = self._find(digests_of(ids))
        return found, int(np.count_nonzero(found >= 0))

    def _find(self, digests: UInt64) -> Int64:
        """Return int64 [N] places of the live records with these digests [N, 2]; -1 for none."""
        halves = digests.astype(np.uint64)  # from big-endian
        highs, lows = halves[:, 0], halves[:, 1]
        if not self.num_live:
            return np.full(len(lows), -1, np.int64)
        # No `searchsorted`: it lets go of the interpreter's lock, for which other threads wait.
        # `take` and `count_nonzero` cost half of `[]` and `any` for a hundred ids.
        at = self.buckets.take(lows >> self.shift).astype(np.int64)
        keys = self.keys.take(at)
        while np.count_nonzero(behind := keys < lows):
            at += behind
            keys = self.keys.take(at)
        places: Int64 = self.order.take(at, mode="clip").astype(np.int64)
        hit = keys == lows
        hit &= self.highs.take(places) == highs
        hit &= self.live.take(places)
        if np.count_nonzero(hit) == len(hit):
            return places
        return self._search(highs, lows, at)

    def _search(self, highs: UInt64, lows: UInt64, at: Int64) -> Int64:
        """Do what `_find` does, from `at` on: some keys are not here, or share their low half."""
        found = np.full(len(lows), -1, np.int64)
        todo = np.arange(len(lows))
        while len(todo):
            keys = self.keys[at]
            # The order's last place stands in for the one behind it, whose key fits nothing live.
            places = self.order[np.minimum(at, self.num_live - 1)].astype(np.int64)
            hit = (keys == lows) & (self.highs[places] == highs) & self.live[places]
            found[todo[hit]] = places[hit]
            onward = ~hit & (keys <= lows) & (at < self.num_live)
            todo, lows, highs, at = todo[onward], lows[onward], highs[onward], at[onward] + 1
        return found

    def holds(self, digest: int) -> bool:
        """Whether a live record has this digest, without arrays."""
        high, low = digest >> 64, digest & (2**64 - 1)
        at = int(self.buckets[low >> int(self.shift)]) if self.num_live else 0
        while at < self.num_live and (key := int(self.keys[at])) <= low:
            place = self.order[at]
            if key == low and int(self.highs[place]) == high and self.live[place]:
                return True
            at += 1
        return False


class RecordIndex:
    """Live records of one generation; grows by appends. Safe to read from several threads."""

    def __init__(self, num_rows: Mapping[int, int], batches: Iterable[RecordBatch], deleted: Int64):
        """Index `batches`, which lie in segments of `num_rows` rows, without the `deleted`."""
        self._num_rows = dict(num_rows)
        self._table = _Table(self._num_rows)
        for batch in batches:
            self._table.fill(batch)
        self._table.kill(deleted)
        self._table.sort()
        self._fresh: list[RecordBatch] = []
        self._fresh_rows: dict[str, int] = {}
        self._dead: list[Int64] = []
        self._num_dead = 0
        self._lock = Lock()

    def add(self, batches: Sequence[RecordBatch], ids: Sequence[str], dead: Int64) -> None:
        """Add records, whose ids are `ids` in this order, behind those of their segments.

        The records at `dead` int64 [N] go in the same step: those replaced, or some of the new.
        """
        with self._lock:
            left, gone = iter(ids), set(dead.tolist())
            for batch in batches:
                locations = range(batch.first_location, batch.first_location + len(batch.records))
                # The locations come first: zip would take one id too many.
                pairs = zip(locations, left, strict=False)
                self._fresh_rows.update((i, at) for at, i in pairs if at not in gone)
                self._num_rows[batch.segment] = batch.stop_row
            self._fresh += batches
            # Last: who looks an id up meanwhile finds the old one or the new.
            self._num_dead += self._table.kill(dead)
            self._dead.append(dead)
        if len(self._fresh_rows) > MAX_FRESH:
            self._merged()

    def remove(self, ids: Sequence[str], locations: Int64) -> None:
        """Take out records, whose row handles are `locations` int64 [N]."""
        with self._lock:
            for image_id in ids:
                self._fresh_rows.pop(image_id, None)
            self._num_dead += self._table.kill(locations)
            self._dead.append(locations)

    def rows(self, ids: Sequence[str]) -> tuple[Int64, list[str]]:
        """Return int64 [N] row handles, and the ids that are unknown."""
        with self._lock:
            table, fresh_rows = self._table, self._fresh_rows
        places, num_known = table.find(ids)
        is_known = num_known == len(ids)
        if is_known:  # the usual case
            found = table.locations(places)
        else:
            known = places >= 0
            found = np.full(len(ids), -1, np.int64)
            found[known] = table.locations(places[known])
        if fresh_rows:
            newer = np.fromiter((fresh_rows.get(i, -1) for i in ids), np.int64, len(ids))
            found = np.where(newer >= 0, newer, found)
        if is_known:
            return found, []
        return found, [ids[at] for at in np.flatnonzero(found < 0).tolist()]

    def plan(self, rows: Int64) -> ReadPlan:
        """Return how to read `rows` int64 [N] in the order they lie on disk.

        Raises:
            RequestError: rows that were never given out.
        """
        table = self._merged()
        positions = rows.argsort()
        locations = rows[positions]
        places = table.ascending_places(locations) if len(rows) else rows
        return ReadPlan(positions, locations, table.lows[places], table.checksums[places])

    def live_rows(self, segment: int | None = None) -> Int64:
        """Return int64 [N] row handles, ascending: all live records', or those in one segment."""
        table = self._merged()
        part = slice(0, len(table.live)) if segment is None else table.rows_of(segment)
        places = np.flatnonzero(table.live[part]) + part.start
        return table.locations(places)

    def ids(self) -> list[str]:
        """Return the ids of the live records in the order these lie in the store."""
        table, names = self._merged(), list[str]()
        for entry in table.ids:
            live = table.live[table.places(np.arange(entry.num_rows) + entry.location)]
            if live.any():
                found = _unpacked(table, entry)
                names += found if live.all() else compress(found, live.tolist())
        return names

    def ids_of(self, rows: Int64) -> list[str]:
        """Return the ids of row handles int64 [N], unpacking no more than these need."""
        table = self._merged()
        firsts = [entry.location for entry in table.ids]
        unpacked: dict[int, list[str]] = {}
        names = []
        for row in rows.tolist():
            at = bisect_right(firsts, row) - 1
            if at not in unpacked:
                unpacked[at] = _unpacked(table, table.ids[at])
            names.append(unpacked[at][row - firsts[at]])
        return names

    def digests(self) -> UInt64:
        """Return uint64 [N], ascending: the low half of each live id's digest."""
        table = self._merged()
        alive = table.live[table.order]
        return table.keys[:-1] if alive.all() else table.keys[:-1][alive]

    def bad_record(self, plan: ReadPlan, place: int, reason: str) -> BadRecord:
        """Name the record at `place` of `plan`."""
        location = int(plan.locations[place])
        (image_id,) = self.ids_of(plan.locations[place : place + 1])
        position = int(plan.positions[place])
        return BadRecord(position, image_id, location >> ROW_BITS, location & ROW_MASK, reason)

    def __len__(self) -> int:
        with self._lock:
            return self._table.num_live - self._num_dead + len(self._fresh_rows)

    def __contains__(self, image_id: object) -> bool:
        if not (isinstance(image_id, str) and is_id(image_id)):
            return False
        with self._lock:
            table, fresh_rows = self._table, self._fresh_rows
        return image_id in fresh_rows or table.holds(xxhash.xxh3_128_intdigest(image_id.encode()))

    def _merged(self) -> _Table:
        """Return the table with everything that was added since the last call."""
        with self._lock:
            if self._fresh:
                table = _Table(self._num_rows)
                table.copy_from(self._table)
                for batch in self._fresh:
                    table.fill(batch)
                for locations in self._dead:
                    table.kill(locations)
                table.sort()
                self._table, self._fresh, self._fresh_rows = table, [], {}
                self._dead, self._num_dead = [], 0
            return self._table


def digests_of(ids: Sequence[str]) -> UInt64:
    """Return the digests of `ids` as big-endian uint64 [N, 2], high half first."""
    try:
        joined = b"".join(map(xxhash.xxh3_128_digest, map(str.encode, ids)))
    except UnicodeEncodeError:  # no id of a store has a lone surrogate: what it gives is unknown
        encoded = (image_id.encode("utf-8", "surrogatepass") for image_id in ids)
        joined = b"".join(map(xxhash.xxh3_128_digest, encoded))
    return np.frombuffer(joined, ">u8").reshape(-1, 2)


def _unpacked(table: _Table, entry: _Ids) -> list[str]:
    """Return the ids of an entry; where they are damaged, what else names its records."""
    try:
        return Records(entry.packed, bytes(16 * entry.num_rows), b"").ids()
    except StoreError:
        places = table.places(np.arange(entry.num_rows) + entry.location)
        return [f"(id with digest ...{low:016x})" for low in table.lows[places].tolist()]
