"""Writing a whole catalog anew, in place of a damaged one."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from .. import disk
from ..catalog import Catalog, Change, sqlite_errors
from ..layout import CATALOG
from ..tables import DAMAGE, CheckedTables
from .salvage import Contents, is_busy

REBUILT = "catalog.rebuilt"
DAMAGED = "catalog.sqlite.damaged"  # what SQLite could not open, kept aside


def write_contents(folder: Path, contents: Contents) -> None:
    """Replace the catalog by one that says exactly `contents`, at the next generation.

    The caller holds the writer's lock. Whoever reads the old one meanwhile is not disturbed.

    Raises:
        StoreError: the catalog cannot be written; the old one is as it was.
    """
    with sqlite_errors(folder):
        _remove(folder / REBUILT)
        Catalog.create(folder, contents.store_json, name=REBUILT)
        with closing(sqlite3.connect(folder / REBUILT, isolation_level=None)) as connection:
            _fill(folder, connection, contents)
            replaced = _copy_over(connection, folder / CATALOG)
        if not replaced:
            _put_in_place(folder)
        _remove(folder / REBUILT)


def _fill(folder: Path, connection: sqlite3.Connection, contents: Contents) -> None:
    """Write `contents` into an empty catalog and onto the disk."""
    connection.execute("PRAGMA synchronous = FULL")
    added = [batch for batches in contents.batches.values() for batch in batches]
    change = Change(added=added, segments=contents.segments, deleted=contents.deleted)
    Catalog(folder, connection).commit(change)
    tables = CheckedTables(connection)
    with tables.transaction("BEGIN IMMEDIATE"):
        ((_, next_segment, num_segments, num_deleted, store_json),) = tables.rows("state")
        tables.delete("state")
        following = max(next_segment, contents.next_segment)
        head = (contents.generation + 1, following, num_segments, num_deleted, store_json)
        tables.insert("state", [head])
        tables.insert("retired", sorted(contents.retired.items()))
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _copy_over(source: sqlite3.Connection, path: Path) -> bool:
    """Replace what is in the catalog in one transaction; return whether it could be done."""
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as target:
            target.execute("PRAGMA synchronous = FULL")
            source.backup(target)
    except DAMAGE as error:
        if is_busy(error):
            raise
        return False
    return True


def _put_in_place(folder: Path) -> None:
    """Rename the rebuilt catalog to where one was that SQLite cannot open; keep that one aside."""
    descriptor = os.open(folder / REBUILT, os.O_RDWR | os.O_CLOEXEC)
    try:
        disk.sync(descriptor)
    finally:
        os.close(descriptor)
    path, aside = folder / CATALOG, folder / DAMAGED
    if path.exists():  # it stays where it is until the new one takes its place
        disk.unlink(aside)
        disk.link(path, aside)
    # Another catalog's log would be played into the new one.
    _remove_log(path)
    disk.rename(folder / REBUILT, path)
    disk.sync_folder(folder)


def _remove(path: Path) -> None:
    """Remove a catalog and SQLite's files beside it."""
    _remove_log(path)
    disk.unlink(path)


def _remove_log(path: Path) -> None:
    for suffix in ("-wal", "-shm"):
        disk.unlink(path.with_name(path.name + suffix))
