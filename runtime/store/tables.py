"""The catalog's tables find and survive damage: each row carries a check and stands in two tables.

What is damaged in one is read from the other; of a damaged first page a copy is made readable.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from ...errors import StoreError
from .format import CATALOG, ROW_BITS

Row = tuple[Any, ...]

APPLICATION_ID = 0x45444A45  # "EDJE"
SCHEMA_VERSION = 2

# Table -> its columns; the first is the primary key, `self_check` (xxh3-64 of the others) follows.
# location: segment << 32 | row. num_rows of a segment counts committed rows: what an unsealed file
# holds beyond them was never acknowledged and is overwritten by the next append. The counts in
# `state` tell a row that is missing; the batches of a segment cover its rows without a gap.
TABLES = {
    # generation grows by one with every commit; a segment number is never used twice; num_deleted
    # counts the locations in `deletions`; store_json is a copy, should the file be damaged
    "state": ("generation", "next_segment", "num_segments", "num_deleted", "store_json"),
    # sealed: has a footer and is never written again. key: random, also in the file; signed here
    "segments": ("segment", "num_rows", "sealed", "key"),
    # location of the first record; ids, digests and checksums as in `Records`
    "batches": ("location", "ids", "digests", "checksums"),
    # generation: the commit that took the records away. locations: i64 of each
    "deletions": ("generation", "locations"),
    # segments whose files go when no reader needs them; generation: the first that does without
    "retired": ("segment", "generation"),
}
COPY = "_copy"
# What SQLite raises for damage; where its message quotes damaged text, Python cannot decode it.
DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)


def create_tables(path: Path) -> sqlite3.Connection:
    """Make a catalog whose tables are empty, not durable yet; return the connection to it."""
    parts = []
    for table, (key, *others) in TABLES.items():
        columns = [key, *others, "self_check"]
        body = ", ".join([f"{key} INTEGER PRIMARY KEY", *columns[1:]])
        values = ", ".join(f"NEW.{column}" for column in columns)
        copy = table + COPY
        parts += [
            f"CREATE TABLE {table} ({body});",
            f"CREATE TABLE {copy} ({body});",
            f"CREATE TRIGGER {table}_in AFTER INSERT ON {table} "
            f"BEGIN INSERT OR REPLACE INTO {copy} VALUES ({values}); END;",
            f"CREATE TRIGGER {table}_out AFTER DELETE ON {table} "
            f"BEGIN DELETE FROM {copy} WHERE {key} = OLD.{key}; END;",
        ]
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = OFF")  # the caller syncs the whole folder
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.executescript("\n".join(["BEGIN;", *parts, "COMMIT;"]))
    except BaseException:
        connection.close()
        raise
    return connection


class CheckedTables:
    """The tables of one connection. `faults` says in words what reading has found damaged."""

    def __init__(self, connection: sqlite3.Connection):
        self.connection = connection
        self.faults: list[str] = []

    def rows(self, table: str, where: str = "TRUE") -> list[Row]:
        """Return the rows of a table without their checks, from both copies if one is damaged."""
        try:
            rows = list(self._select(table, where, "ASC"))
        except DAMAGE as error:
            self.note(f"table {table}: {error}")
            return self.merged_rows(table, where)
        if all(_is_whole(row) for row in rows):
            return [row[:-1] for row in rows]
        return self.merged_rows(table, where)

    def merged_rows(self, table: str, where: str = "TRUE") -> list[Row]:
        """Return every row that is whole in the table or in its copy, by primary key."""
        found: dict[int, Row] = {}
        for name in (table, table + COPY):
            for row in self._salvaged(name, where):
                if _is_whole(row):
                    found.setdefault(row[0], row[:-1])
                else:
                    self.note(f"table {name}, {TABLES[table][0]} {_shown(row[0])}: a damaged row")
        return [found[key] for key in sorted(found)]

    def _salvaged(self, table: str, where: str) -> Iterator[Row]:
        """Yield the rows in front of a page that SQLite cannot read, and those behind it."""
        for direction in ("ASC", "DESC"):
            try:
                yield from self._select(table, where, direction)
                return
            except DAMAGE as error:
                self.note(f"table {table}: {error}")

    def _select(self, table: str, where: str, direction: str) -> Iterator[Row]:
        query = f"SELECT * FROM {table} WHERE {where} ORDER BY 1 {direction}"
        return self.connection.execute(query)

    def insert(self, table: str, rows: Sequence[Row]) -> None:
        """Add rows, each with its check."""
        marks = ", ".join("?" * (len(TABLES[table]) + 1))
        checked = [(*row, _self_check(row)) for row in rows]
        self.connection.executemany(f"INSERT INTO {table} VALUES ({marks})", checked)

    def delete(self, table: str, where: str = "TRUE") -> int:
        """Take rows away; return how many there were."""
        return self.connection.execute(f"DELETE FROM {table} WHERE {where}").rowcount

    def note(self, fault: str) -> None:
        """Remember what was found damaged, once."""
        if fault not in self.faults:
            self.faults.append(fault)

    @contextmanager
    def transaction(self, begin: str) -> Iterator[None]:
        """Commit when the block ends well, else roll back."""
        self.connection.execute(begin)
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise


def _is_whole(row: Row) -> bool:
    check = _self_check(row[:-1])
    return check is not None and bool(row[-1] == check)


def _self_check(values: Sequence[Any]) -> int | None:
    """Return xxh3-64 of a row's values, i64 or length and bytes each, as a signed number."""
    state = xxhash.xxh3_64()
    for value in values:
        if isinstance(value, bytes):
            state.update(len(value).to_bytes(8, "little"))
            state.update(value)
        elif isinstance(value, int):
            state.update(value.to_bytes(8, "little", signed=True))
        else:  # no value of ours: damage has changed its type
            return None
    return int.from_bytes(state.digest(), "big", signed=True)


def _shown(value: Any) -> str:
    if not isinstance(value, int):
        return repr(value)[:40]
    return f"{value} (segment {value >> ROW_BITS})" if value >> ROW_BITS else str(value)


# In the first page: u32 number of pages; u32 first free page and u32 number of free pages, which
# a reader does not need.
NUM_PAGES_AT, FREE_PAGES_AT = 28, 32
PAGE_SIZE_AT = 16


@contextmanager
def sound_copy(path: Path) -> Iterator[Path]:
    """Yield a copy of the catalog at `path`, and of its log, with a first page that is whole.

    Raises:
        StoreError: there is no room for the copy.
    """
    with tempfile.TemporaryDirectory(prefix="edje-catalog-") as name:
        folder = Path(name)
        copy, log = folder / CATALOG, f"{CATALOG}-wal"
        try:
            create_tables(folder / "empty").close()
            shutil.copyfile(path, copy)
            if path.with_name(log).exists():
                shutil.copyfile(path.with_name(log), folder / log)
            _replace_first_page(copy, (folder / "empty").read_bytes())
        except (OSError, sqlite3.OperationalError) as error:
            raise StoreError(
                f"cannot copy {path} to {folder.parent}: {getattr(error, 'strerror', error)}",
                hint="make room there, or name another folder with TMPDIR",
            ) from error
        yield copy


def _replace_first_page(copy: Path, empty: bytes) -> None:
    page_bytes = int.from_bytes(empty[PAGE_SIZE_AT : PAGE_SIZE_AT + 2], "big")
    page = bytearray(empty[:page_bytes])
    num_pages = copy.stat().st_size // page_bytes
    page[NUM_PAGES_AT:FREE_PAGES_AT] = num_pages.to_bytes(4, "big")
    page[FREE_PAGES_AT : FREE_PAGES_AT + 8] = bytes(8)
    with copy.open("r+b") as file:
        file.write(page)
