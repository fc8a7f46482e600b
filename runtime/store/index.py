"""The records of a store in memory: id -> row handle -> what the record must hash to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from ...errors import RequestError
from .catalog import ROW_BITS, Int64, RecordBatch, UInt64
from .reader import BadRecord, ReadPlan


@dataclass(frozen=True, slots=True)
class _Columns:
    """One value a record, sorted by location: int64 [N], uint64 [N], uint64 [N]."""

    locations: Int64
    seeds: UInt64
    checksums: UInt64


class RecordIndex:
    """Live records of one generation; grows by appends. Safe to read from several threads."""

    def __init__(self, batches: Sequence[RecordBatch], deleted: set[int]):
        self._location_of: dict[str, int] = {}
        self._columns = _Columns(
            np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.uint64)
        )
        self._fresh: list[RecordBatch] = []
        self._lock = Lock()
        self.add(batches)
        for image_id in [i for i, location in self._location_of.items() if location in deleted]:
            del self._location_of[image_id]

    def add(self, batches: Sequence[RecordBatch]) -> None:
        """Add records that lie behind all others."""
        with self._lock:
            for batch in batches:
                self._location_of.update(zip(batch.ids, batch.locations.tolist(), strict=True))
            self._fresh += batches

    def rows(self, ids: Sequence[str]) -> tuple[Int64, list[str]]:
        """Return int64 [N] locations, and the ids that are unknown."""
        found = [self._location_of.get(image_id, -1) for image_id in ids]
        unknown = [i for i, location in zip(ids, found, strict=True) if location < 0]
        return np.array(found, dtype=np.int64), unknown

    def plan(self, rows: Int64) -> ReadPlan:
        """Return how to read `rows` int64 [N] in the order they lie on disk.

        Raises:
            RequestError: rows that were never given out.
        """
        columns = self._merged()
        positions = np.argsort(rows, kind="stable")
        locations = rows[positions]
        at = np.searchsorted(columns.locations, locations)
        known = at < len(columns.locations)
        known[known] = columns.locations[at[known]] == locations[known]
        if not known.all():
            foreign = locations[~known][:20].tolist()
            count = int((~known).sum())
            raise RequestError(f"{count} rows are not of this store: {foreign}")
        return ReadPlan(positions, locations, columns.seeds[at], columns.checksums[at])

    def bad_record(self, plan: ReadPlan, place: int, reason: str) -> BadRecord:
        """Name the record at `place` of `plan` (slow: only for messages)."""
        location = int(plan.locations[place])
        items = list(self._location_of.items())
        image_id = next((i for i, at in items if at == location), "(deleted)")
        segment, row = location >> ROW_BITS, location & ((1 << ROW_BITS) - 1)
        return BadRecord(int(plan.positions[place]), image_id, segment, row, reason)

    def ids(self) -> list[str]:
        """Return the ids in the order they were appended."""
        return list(self._location_of)

    def __len__(self) -> int:
        return len(self._location_of)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._location_of

    def _merged(self) -> _Columns:
        """Return the columns with everything that was added since the last call."""
        with self._lock:
            if self._fresh:
                old, fresh, self._fresh = self._columns, self._fresh, []
                self._columns = _Columns(
                    np.concatenate([old.locations, *(batch.locations for batch in fresh)]),
                    np.concatenate([old.seeds, *(batch.id_hashes for batch in fresh)]),
                    np.concatenate([old.checksums, *(batch.checksums for batch in fresh)]),
                )
            return self._columns
