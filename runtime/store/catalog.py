"""`catalog.sqlite`: which records exist, where they lie, what their bytes must hash to.

One row of `batches` holds the records of one append in one segment, packed: a million records load
in a fraction of a second. When a segment is sealed its batches are joined to 1,024 records a row.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ...arrays import Int64
from ...errors import StoreError
from .format import CATALOG, ROW_BITS, ROW_MASK
from .records import CHECKSUM_BYTES, DIGEST_BYTES, RecordBatch, Records
from .tables import APPLICATION_ID, SCHEMA_VERSION, CheckedTables, Row, create_tables

LEAST_ROOM = 1 << 16  # SQLite's -shm file takes 32 KiB


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment file: its committed rows, whether it is sealed, and its key (u64)."""

    num_rows: int
    sealed: bool
    key: int


@dataclass(frozen=True, slots=True)
class CatalogState:
    """One generation of the store, without its records."""

    generation: int
    next_segment: int
    store_json: bytes
    segments: dict[int, Segment]
    deleted: Int64
    retired: dict[int, int]


@dataclass(slots=True)
class Change:
    """What one commit does, all of it or nothing.

    Attributes:
        added: new records; they stand behind the rows their segments had.
        segments: segments that are new, or whose rows or seal change.
        deleted: int64 [n]: locations of records that go.
        dropped: segments that go with all their records.
        rebatched: segments whose batches are replaced by others of the same records.
    """

    added: Sequence[RecordBatch] = ()
    segments: dict[int, Segment] = field(default_factory=dict)
    deleted: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    dropped: Sequence[int] = ()
    rebatched: dict[int, list[RecordBatch]] = field(default_factory=dict)


class Catalog:
    """A connection to `catalog.sqlite`. The writer keeps one, a reader only while it opens.

    Its methods raise a StoreError where the catalog cannot be read or written; then nothing has
    changed.
    """

    def __init__(self, folder: Path, connection: sqlite3.Connection):
        self._folder = folder
        self._connection = connection
        self._tables = CheckedTables(connection)

    @property
    def faults(self) -> list[str]:
        """What reading has found damaged, in words."""
        return self._tables.faults

    @classmethod
    def create(cls, folder: Path, store_json: bytes, *, name: str = CATALOG) -> None:
        """Write an empty catalog into `folder`; the caller makes it durable (fsync)."""
        connection = create_tables(folder / name)
        try:
            CheckedTables(connection).insert("state", [(0, 1, 0, 0, store_json)])
        finally:
            connection.close()

    @classmethod
    def open(cls, folder: Path, *, writable: bool) -> Catalog:
        """Connect to the catalog of the store at `folder`.

        Raises:
            StoreError: missing, damaged, or of another schema version.
        """
        with sqlite_errors(folder):
            connection = _connect(folder, writable=writable)
            try:
                _check_identity(folder, connection)
                connection.execute("PRAGMA synchronous = FULL")  # a commit is on disk
            except BaseException:
                connection.close()
                raise
        return cls(folder, connection)

    @contextmanager
    def snapshot(self) -> Iterator[CatalogState]:
        """Hold one generation while the block runs, so that `batches` belongs to the state."""
        with sqlite_errors(self._folder), self._tables.transaction("BEGIN"):
            yield self._state()

    def state(self) -> CatalogState:
        """Return the newest generation."""
        with self.snapshot() as state:
            return state

    def batches(self, segment: int, num_rows: int) -> list[RecordBatch]:
        """Return the batches of a segment with `num_rows` records, by row.

        What neither table holds whole is left out, and named in `faults`.
        """
        found: list[RecordBatch] = []
        for read in (self._tables.rows, self._tables.merged_rows):
            batches = batches_in(read("batches", _within(segment)))
            found = [batch for batch in batches if batch.stop_row <= num_rows]
            if not gaps_of(found, num_rows):
                return found
        for start, stop in gaps_of(found, num_rows):
            rows = f"rows {start} to {stop - 1}" if stop > start + 1 else f"row {start}"
            self._tables.note(f"segment {segment}, {rows}: the catalog's entry is lost, twice")
        return found

    def commit(self, change: Change) -> None:
        """Make one change in one transaction that is on disk when this returns."""
        tables = self._tables
        with sqlite_errors(self._folder), tables.transaction("BEGIN IMMEDIATE"):
            generation, next_segment, num_segments, num_deleted, store_json = self._head()
            generation += 1
            for segment in change.dropped:
                num_segments -= tables.delete("segments", f"segment = {segment}")
                tables.insert("retired", [(segment, generation)])
            for segment in {*change.dropped, *change.rebatched}:
                tables.delete("batches", _within(segment))
            added = [*change.added, *(one for many in change.rebatched.values() for one in many)]
            tables.insert("batches", [_packed(batch) for batch in added])
            for segment, info in change.segments.items():
                num_segments -= tables.delete("segments", f"segment = {segment}")
                tables.insert("segments", [_segment_row(segment, info)])
                num_segments += 1
                next_segment = max(next_segment, segment + 1)
            num_deleted += self._write_deletions(change, generation)
            tables.delete("state")
            head = (generation, next_segment, num_segments, num_deleted, store_json)
            tables.insert("state", [head])

    def forget_retired(self, segments: Sequence[int]) -> None:
        """Note that the files of these retired segments are gone."""
        with sqlite_errors(self._folder), self._tables.transaction("BEGIN IMMEDIATE"):
            for segment in segments:
                self._tables.delete("retired", f"segment = {segment}")

    def shorten_log(self) -> None:
        """Move what the write-ahead log holds into the catalog, and give the log's space back.

        What fails is done later by SQLite itself: only space depends on it.
        """
        with suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def close(self) -> None:
        """Close the connection. Calling it twice is allowed."""
        self._connection.close()

    def _head(self) -> Row:
        rows = self._tables.rows("state")
        if len(rows) != 1:
            raise damaged(self._folder, f"its state has {len(rows)} whole rows, expected 1")
        return rows[0]

    def _state(self) -> CatalogState:
        generation, next_segment, num_segments, num_deleted, store_json = self._head()
        segments = self._tables.rows("segments")
        deleted = locations_in(self._tables.rows("deletions"))
        if len(segments) != num_segments:
            segments = self._tables.merged_rows("segments")
        if len(deleted) != num_deleted:
            deleted = locations_in(self._tables.merged_rows("deletions"))
        if (len(segments), len(deleted)) != (num_segments, num_deleted):
            got = f"{len(segments)} of {num_segments} segments"
            got += f" and {len(deleted)} of {num_deleted} deletions"
            raise damaged(self._folder, f"{got} can be read, from both copies")
        self._check_sizes(segments)
        retired: dict[int, int] = dict(self._tables.rows("retired"))
        known = segments_in(segments)
        return CatalogState(generation, next_segment, store_json, known, deleted, retired)

    def _check_sizes(self, segments: Sequence[Row]) -> None:
        """Believe no number before it fits the file: digests and checksums stand in it twice."""
        (num_pages,) = self._connection.execute("PRAGMA page_count").fetchone()
        (page_bytes,) = self._connection.execute("PRAGMA page_size").fetchone()
        room = num_pages * page_bytes // (2 * (DIGEST_BYTES + CHECKSUM_BYTES))
        total = sum(row[1] for row in segments)
        odd = [row[0] for row in segments if not (0 < row[0] < 1 << 31 and row[1] >= 0)]
        if odd or total > room:
            got = f"segments {odd[:20]}, {total} records where {room} have room"
            raise damaged(self._folder, f"it lists what cannot be: {got}")

    def _write_deletions(self, change: Change, generation: int) -> int:
        """Add the deleted locations, forget those in dropped segments; return how many more."""
        new, before = change.deleted, 0
        if change.dropped:
            deleted = locations_in(self._tables.rows("deletions"))
            kept = deleted[~np.isin(deleted >> ROW_BITS, np.array(change.dropped))]
            new, before = np.concatenate([kept, change.deleted]), len(deleted)
            self._tables.delete("deletions")
        if len(new):
            self._tables.insert("deletions", [(generation, new.astype("<i8").tobytes())])
        return len(new) - before


def batches_in(rows: Sequence[Row]) -> list[RecordBatch]:
    """Unpack rows of `batches`, but for those whose columns do not fit each other."""
    found = [
        RecordBatch(location >> ROW_BITS, location & ROW_MASK, Records(*columns))
        for location, *columns in rows
    ]
    return [batch for batch in found if batch.records.is_sound()]


def segments_in(rows: Sequence[Row]) -> dict[int, Segment]:
    """Unpack rows of `segments`."""
    return {row[0]: Segment(row[1], bool(row[2]), row[3] % (1 << 64)) for row in rows}


def locations_in(rows: Sequence[Row]) -> Int64:
    """Unpack rows of `deletions`: int64 [N]."""
    parts = [np.frombuffer(blob, "<i8") for _, blob in rows]
    return np.concatenate([np.empty(0, np.int64), *parts])


def gaps_of(batches: Sequence[RecordBatch], num_rows: int) -> list[tuple[int, int]]:
    """Return the [start, stop) of rows that no batch covers."""
    gaps, at = [], 0
    for batch in batches:
        if batch.first_row > at:
            gaps.append((at, batch.first_row))
        at = max(at, batch.stop_row)
    return [*gaps, (at, num_rows)] if at < num_rows else gaps


def _within(segment: int) -> str:
    """Return the SQL condition for the locations in a segment."""
    return f"location BETWEEN {segment << ROW_BITS} AND {((segment + 1) << ROW_BITS) - 1}"


def _segment_row(segment: int, info: Segment) -> tuple[int, ...]:
    key = info.key - (1 << 64) if info.key >> 63 else info.key  # SQLite's numbers are signed
    return (segment, info.num_rows, int(info.sealed), key)


def _packed(batch: RecordBatch) -> Row:
    records = batch.records
    return (batch.first_location, records.packed_ids, records.digests, records.checksums)


def _connect(folder: Path, *, writable: bool) -> sqlite3.Connection:
    path = folder / CATALOG
    connect = partial(sqlite3.connect, uri=True, isolation_level=None, check_same_thread=False)
    uri = f"{path.absolute().as_uri()}?mode={'rw' if writable else 'ro'}"
    connection = connect(uri)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        # WAR: SQLite wants to make a -shm file beside a WAL database even to read it. In a folder
        # that nobody can write there is no writer, so the file alone is the whole truth.
        log = path.with_name(CATALOG + "-wal")
        if writable or (log.exists() and log.stat().st_size):
            raise
        connection = connect(f"{uri}&immutable=1")
    return connection


def _check_identity(folder: Path, connection: sqlite3.Connection) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        raise damaged(folder, f"it is no catalog of a token store (application id {application})")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{folder / CATALOG} has schema version {version}, this edje reads {SCHEMA_VERSION}",
            hint="open the store with the edje that wrote it last",
        )


@contextmanager
def sqlite_errors(folder: Path) -> Iterator[None]:
    """Turn what SQLite and the unpacking of its values raise into a `StoreError`."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if _is_full(folder, error):
            raise StoreError(
                f"cannot write {folder / CATALOG}: no space left on its disk ({error})",
                hint="make room on the disk and try again",
            ) from error
        raise StoreError(f"cannot use {folder / CATALOG}: {error}") from error
    except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
        raise damaged(folder, str(error)) from error


def _is_full(folder: Path, error: sqlite3.OperationalError) -> bool:
    """Whether the disk is full; SQLite calls it an I/O error where its -shm file has no room."""
    if "disk I/O" in str(error):
        with suppress(OSError):
            return shutil.disk_usage(folder).free < LEAST_ROOM
    return "is full" in str(error)


def damaged(folder: Path, reason: str) -> StoreError:
    return StoreError(
        f"{folder / CATALOG} is damaged: {reason}",
        hint=f"`edje store verify --repair {folder}` rebuilds it from what the segments know",
    )
