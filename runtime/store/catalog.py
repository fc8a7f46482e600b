"""`catalog.sqlite`: which records exist, where they lie, what their bytes must hash to.

One row of `batches` holds the records of one append in one segment, as packed arrays: a million
records load in a fraction of a second, and `self_check` tells damage at opening.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from ...errors import StoreError
from .layout import CATALOG, id_hash

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

APPLICATION_ID = 0x45444A45  # "EDJE"
SCHEMA_VERSION = 1
ROW_BITS = 32

# location: segment << 32 | row. num_rows of a segment counts committed rows: what a file holds
# beyond them was never acknowledged and is overwritten by the next append.
SCHEMA = """
CREATE TABLE state (
    generation INTEGER NOT NULL,    -- grows by one with every commit
    next_segment INTEGER NOT NULL   -- a segment number is never used twice
);
CREATE TABLE segments (
    segment INTEGER PRIMARY KEY,
    num_rows INTEGER NOT NULL,
    sealed INTEGER NOT NULL         -- 1: never written again
);
CREATE TABLE batches (
    location INTEGER PRIMARY KEY,   -- of the first record; the others follow row by row
    num_rows INTEGER NOT NULL,
    ids TEXT NOT NULL,              -- JSON array of num_rows strings
    id_hashes BLOB NOT NULL,        -- u64[num_rows]: xxh3-64 of each id, the seed of its checksum
    checksums BLOB NOT NULL,        -- u64[num_rows]: xxh3-64 of each record
    self_check INTEGER NOT NULL     -- xxh3-64 of the row, as a signed number
);
CREATE TABLE deletions (
    location INTEGER PRIMARY KEY,
    generation INTEGER NOT NULL     -- the commit that took the record away
);
INSERT INTO state VALUES (0, 0);
"""


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Records that lie one after the other in one segment.

    `id_hashes` and `checksums` are uint64 [n], `ids` has n strings.
    """

    segment: int
    first_row: int
    ids: tuple[str, ...]
    id_hashes: UInt64
    checksums: UInt64

    @property
    def locations(self) -> Int64:
        """int64 [n]: the row handles of the records."""
        first = (self.segment << ROW_BITS) | self.first_row
        return np.arange(first, first + len(self.ids), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class CatalogState:
    """One generation of the store.

    `segments` maps a segment to its committed rows; `active` is the one that takes appends.
    """

    generation: int
    next_segment: int
    segments: dict[int, int]
    active: int | None


class Catalog:
    """A connection to `catalog.sqlite`. The writer keeps one, a reader only while it opens."""

    def __init__(self, folder: Path, connection: sqlite3.Connection):
        self._folder = folder
        self._connection = connection

    @classmethod
    def create(cls, folder: Path) -> None:
        """Write an empty catalog into `folder`; the caller makes it durable (fsync)."""
        connection = sqlite3.connect(folder / CATALOG, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = OFF")  # the caller syncs the whole folder
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.executescript(f"BEGIN; {SCHEMA} COMMIT;")
        finally:
            connection.close()

    @classmethod
    def open(cls, folder: Path, *, writable: bool) -> Catalog:
        """Connect to the catalog of the store at `folder`.

        Raises:
            StoreError: missing, damaged, or of another schema version.
        """
        with _sqlite_errors(folder):
            connection = _connect(folder, writable=writable)
            try:
                _check_identity(folder, connection)
                connection.execute("PRAGMA synchronous = FULL")  # a commit is on disk
            except BaseException:
                connection.close()
                raise
        return cls(folder, connection)

    def load(self) -> tuple[CatalogState, list[RecordBatch], set[int]]:
        """Return one consistent generation: state, batches by location, deleted locations.

        Raises:
            StoreError: a row of the catalog is damaged; it names the segment and the ids.
        """
        with _sqlite_errors(self._folder), self._transaction("BEGIN"):
            select = self._connection.execute
            batches = [self._batch(*row) for row in select("SELECT * FROM batches ORDER BY 1")]
            deleted = {row[0] for row in select("SELECT location FROM deletions")}
            segments = select("SELECT * FROM segments").fetchall()
            state = select("SELECT * FROM state").fetchall()
        if len(state) != 1:
            raise _damaged(self._folder, f"its state has {len(state)} rows, expected 1")
        unsealed = [segment for segment, _, sealed in segments if not sealed]
        committed = {segment: num_rows for segment, num_rows, _ in segments}
        active = max(unsealed, default=None)
        generation, next_segment = state[0]
        return CatalogState(generation, next_segment, committed, active), batches, deleted

    def commit(self, batches: list[RecordBatch], *, max_rows: int) -> None:
        """Add records in one transaction that is on disk when this returns.

        A segment that holds `max_rows` becomes sealed.

        Raises:
            StoreError: the catalog cannot be written; then nothing was added.
        """
        rows = [(*_packed(batch), _self_check(*_packed(batch))) for batch in batches]
        counts = [(batch.segment, batch.first_row + len(batch.ids)) for batch in batches]
        with _sqlite_errors(self._folder), self._transaction("BEGIN IMMEDIATE"):
            self._connection.executemany("INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._connection.executemany(
                "INSERT OR REPLACE INTO segments VALUES (?, ?, ?)",
                [(segment, num_rows, int(num_rows >= max_rows)) for segment, num_rows in counts],
            )
            self._connection.execute(
                "UPDATE state SET generation = generation + 1, next_segment = max(next_segment, ?)",
                (1 + max(segment for segment, _ in counts),),
            )

    def close(self) -> None:
        """Close the connection. Calling it twice is allowed."""
        self._connection.close()

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        self._connection.execute(begin)
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _batch(
        self, location: int, num_rows: int, ids: str, hashes: bytes, sums: bytes, check: int
    ) -> RecordBatch:
        """Unpack one row of `batches` after its self check."""
        segment, first_row = location >> ROW_BITS, location & ((1 << ROW_BITS) - 1)
        if check != _self_check(location, num_rows, ids, hashes, sums):
            where = f"segment {segment}, rows {first_row} to {first_row + num_rows - 1}"
            raise _damaged(self._folder, f"the entry of {where} fails its check, ids {ids[:200]}")
        names = tuple(json.loads(ids))
        id_hashes, checksums = np.frombuffer(hashes, "<u8"), np.frombuffer(sums, "<u8")
        if not num_rows == len(names) == len(id_hashes) == len(checksums):
            raise _damaged(self._folder, f"an entry of segment {segment} has columns unlike long")
        return RecordBatch(segment, first_row, names, id_hashes, checksums)


def make_batch(segment: int, first_row: int, ids: tuple[str, ...], sums: UInt64) -> RecordBatch:
    """Return the batch of `ids`, whose records have the checksums `sums` uint64 [n]."""
    hashes = np.fromiter(map(id_hash, ids), dtype=np.uint64, count=len(ids))
    return RecordBatch(segment, first_row, ids, hashes, sums)


def _packed(batch: RecordBatch) -> tuple[int, int, str, bytes, bytes]:
    return (
        (batch.segment << ROW_BITS) | batch.first_row,
        len(batch.ids),
        json.dumps(batch.ids, ensure_ascii=False, separators=(",", ":")),
        batch.id_hashes.astype("<u8").tobytes(),
        batch.checksums.astype("<u8").tobytes(),
    )


def _self_check(location: int, num_rows: int, ids: str, hashes: bytes, sums: bytes) -> int:
    state = xxhash.xxh3_64(f"{location} {num_rows} {ids}".encode())
    state.update(hashes)
    state.update(sums)
    return int.from_bytes(state.digest(), "big", signed=True)  # SQLite numbers are signed


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
        raise _damaged(folder, f"it is no catalog of a token store (application id {application})")
    if version != SCHEMA_VERSION:
        raise StoreError(
            f"{folder / CATALOG} has schema version {version}, this edje reads {SCHEMA_VERSION}",
            hint="open the store with the edje that wrote it last",
        )


@contextmanager
def _sqlite_errors(folder: Path) -> Iterator[None]:
    """Turn what SQLite and the unpacking of its values raise into a `StoreError`."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StoreError(f"cannot use {folder / CATALOG}: {error}") from error
    except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
        raise _damaged(folder, str(error)) from error


def _damaged(folder: Path, reason: str) -> StoreError:
    return StoreError(
        f"{folder / CATALOG} is damaged: {reason}",
        hint=f"restore {CATALOG} from a copy, or index the images into a new store",
    )
