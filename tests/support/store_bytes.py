"""The bytes of a store, read, forged and damaged by the format's text, not by the package."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
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


def flip(path: Path, offset: int, mask: int = 4) -> None:
    """Flip bits of one byte in place; an offset below zero counts from the end."""
    with path.open("r+b") as file:
        at = file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        value = file.read(1)[0] ^ mask
        file.seek(at)
        file.write(bytes([value]))


def open_files(folder: Path) -> list[str]:
    """Return the files below `folder` that this process holds open."""
    held = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of this very listing
            held.append(os.readlink(link))
    return [target for target in held if target.startswith(str(folder))]
