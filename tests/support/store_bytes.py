"""The catalog of a store, read and forged by the format's text, with nothing of the package."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import xxhash

Row = tuple[int | bytes, ...]


def self_check(values: Row) -> int:
    """Return the check of a catalog row, by the text."""
    parts = [
        len(value).to_bytes(8, "little") + value
        if isinstance(value, bytes)
        else value.to_bytes(8, "little", signed=True)
        for value in values
    ]
    return int.from_bytes(xxhash.xxh3_64_digest(b"".join(parts)), "big", signed=True)


def rows_of(path: Path, table: str) -> list[Row]:
    """Return the rows of a catalog table, without the checks that they and their copies fit."""
    with closing(sqlite3.connect(path / "catalog.sqlite")) as catalog:
        rows = catalog.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
        assert rows == catalog.execute(f"SELECT * FROM {table}_copy ORDER BY 1").fetchall()
    assert all(row[-1] == self_check(row[:-1]) for row in rows)
    return [row[:-1] for row in rows]


def rewrite(path: Path, table: str, key: str, row: Row) -> None:
    """Put a row with a right check in the place of those at `key`; the copy follows by itself."""
    with closing(sqlite3.connect(path / "catalog.sqlite", isolation_level=None)) as catalog:
        catalog.execute(f"DELETE FROM {table} WHERE {key}")
        marks = ", ".join("?" * (len(row) + 1))
        catalog.execute(f"INSERT INTO {table} VALUES ({marks})", (*row, self_check(row)))
