"""What a damaged store still tells: headers, footers, catalog; a catalog rebuilt from them."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from ...errors import StoreError
from . import disk
from .catalog import Catalog, Change, RecordBatch, Segment, sqlite_errors
from .format import (
    CATALOG,
    CHECKSUM_AT,
    INCOMING,
    LOCK,
    PAGE_BYTES,
    READERS,
    SEGMENTS,
    STORE_JSON,
    StoreLayout,
    header_fault,
    header_page,
    segment_name,
)
from .read import BadRecord
from .records import Records, digests_of, footer_bytes
from .salvage import (
    Contents,
    add_sealed_segments,
    batches_of,
    footer_of,
    is_busy,
    keep_newest,
    layout_of,
    read_contents,
)
from .tables import DAMAGE, CheckedTables

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


KNOWN = {STORE_JSON, CATALOG, f"{CATALOG}-wal", f"{CATALOG}-shm", SEGMENTS, INCOMING, LOCK, READERS}
KNOWN |= {"skipped.jsonl"}  # written by `edje index`
UNSEALED = ".lost"  # behind the name of a segment file whose ids are lost


@dataclass(slots=True)
class Structure:
    """What `inspect` found.

    Attributes:
        contents: what the catalog says or, where it is damaged, must say.
        faults: damage, in words.
        damaged: records of files that are gone.
        out_of_reach: segments whose files are there but cannot be used as they are.
        leftovers: files that the store does not need.
    """

    folder: Path
    layout: StoreLayout
    contents: Contents
    faults: list[str] = field(default_factory=list)
    damaged: list[BadRecord] = field(default_factory=list)
    out_of_reach: set[int] = field(default_factory=set)
    leftovers: list[str] = field(default_factory=list)
    mends: list[tuple[str, Callable[[], None]]] = field(default_factory=list)

    def mend(self) -> list[str]:
        """Mend what can be mended; return it in words. The caller is the store's one writer.

        Raises:
            StoreError: the disk cannot be written.
        """
        try:
            for _, action in self.mends:
                action()
        except OSError as error:
            raise StoreError(f"cannot mend the store {self.folder}: {error.strerror}") from error
        return [text for text, _ in self.mends]


def inspect(folder: Path) -> Structure:
    """Check everything but the records of the store at `folder`; changes nothing.

    Raises:
        StoreError: no store there, another version's, or nothing is left that says its layout.
    """
    contents = read_contents(folder)
    layout, fault = layout_of(folder, contents)
    found = Structure(folder, layout, contents)
    if fault:
        found.faults.append(fault)
        found.mends.append((f"{STORE_JSON} was written anew", partial(_write_json, folder, layout)))
    elif contents.store_json not in (b"", layout.to_bytes()):
        contents.faults.append(f"{CATALOG}: its copy of {STORE_JSON} is another store's")
    contents.store_json = layout.to_bytes()
    if contents.lost:
        _fill_from_footers(found)
    for segment, info in sorted(contents.segments.items()):
        _inspect_segment(found, segment, info)
    found.faults += [*contents.faults, *(f"lost: {what}" for what in contents.lost)]
    if contents.is_damaged or found.damaged:
        found.mends.append(
            (f"{CATALOG} was written anew", partial(write_contents, folder, contents))
        )
    found.leftovers = list(_leftovers(folder, contents))
    return found


def _fill_from_footers(found: Structure) -> None:
    """Add what the catalog has lost and the segments know."""
    contents = found.contents
    if contents.lost_segments:
        for path in add_sealed_segments(found.folder, found.layout, contents):
            aside = path.with_name(path.name + UNSEALED)
            text = f"{path.name} was set aside as {aside.name}"
            found.mends.append((text, partial(disk.rename, path, aside)))
    older = keep_newest(contents)
    if older:
        contents.lost.append(f"which of {older} records were replaced: the newest of each id stays")


def _inspect_segment(found: Structure, segment: int, info: Segment) -> None:
    """Check one segment: its file, header page, rows and footer."""
    path = found.folder / SEGMENTS / segment_name(segment)
    try:
        with path.open("rb") as file:
            page, size = file.read(PAGE_BYTES), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        found.faults.append(f"segment {segment}: its file {path.name} is missing")
        found.damaged += [
            BadRecord(-1, image_id, segment, row, f"its file {path.name} is missing")
            for row, image_id in found.contents.drop(segment)
        ]
        return
    except OSError as error:
        found.faults.append(f"segment {segment}: cannot be read ({error.strerror})")
        found.out_of_reach.add(segment)
        return
    fault = header_fault(page, found.layout, info.key)
    if fault:
        found.faults.append(f"segment {segment}: {fault}")
    if fault and _is_whole_page(page):  # another file in its place: none of its bytes is damaged
        found.out_of_reach.add(segment)
        return
    if fault:
        content = header_page(found.layout, info.key)
        _plan_write(found, f"segment {segment}: its header page was written anew", path, content, 0)
    _inspect_rows(found, path, segment, info, found.layout.end(info.num_rows) - size)


def _inspect_rows(
    found: Structure, path: Path, segment: int, info: Segment, missing_bytes: int
) -> None:
    """Compare length, rows and footer of a segment file with the catalog."""
    contents, layout = found.contents, found.layout
    footer = footer_of(path, layout, info.key) if info.sealed else ""
    gaps = _gaps(contents.batches.get(segment, []), info.num_rows)
    if gaps:
        whole = None if isinstance(footer, str) else footer[1]
        _fill_gaps(contents, segment, gaps, whole)
    if missing_bytes > 0:
        found.faults.append(f"segment {segment}: the file ends {missing_bytes} bytes early")
    if not info.sealed:
        if missing_bytes > 0:
            text = f"segment {segment}: zeros stand for the bytes that are gone"
            found.mends.append((text, partial(disk.truncate, path, layout.end(info.num_rows))))
        return
    parts = [batch.records for batch in contents.batches[segment]]
    if not isinstance(footer, str):
        footer = (
            "" if _same(footer[1], parts) else "its footer names other records than the catalog"
        )
    if footer:
        found.faults.append(f"segment {segment}: {footer}")
        text = f"segment {segment}: its footer was written anew"
        content = footer_bytes(Records.join(parts), info.key)
        _plan_write(found, text, path, content, layout.end(info.num_rows))


def _same(whole: Records, parts: Sequence[Records]) -> bool:
    """Return whether `parts` are the records of `whole`, one after the other."""
    digests = b"".join(part.digests for part in parts)
    return whole.digests == digests and whole.checksums == b"".join(p.checksums for p in parts)


def _gaps(batches: Sequence[RecordBatch], num_rows: int) -> list[tuple[int, int]]:
    """Return the [start, stop) of rows that no batch covers."""
    starts = [0, *(batch.stop_row for batch in batches)]
    stops = [*(batch.first_row for batch in batches), num_rows]
    return [edges for edges in zip(starts, stops, strict=True) if edges[0] < edges[1]]


def _fill_gaps(
    contents: Contents, segment: int, gaps: Sequence[tuple[int, int]], footer: Records | None
) -> None:
    """Put in what the footer knows; without one, let records that nobody can name be deleted."""
    count = sum(stop - start for start, stop in gaps)
    if footer is not None:
        contents.faults.append(f"{CATALOG}: {count} records of segment {segment} are in no row")
        contents.batches[segment] = batches_of(segment, footer)
        return
    contents.lost.append(f"the ids of {count} records of segment {segment}")
    batches = contents.batches.setdefault(segment, [])
    for start, stop in gaps:
        names = [f"lost/{segment}/{row}" for row in range(start, stop)]
        records = Records.pack(names, digests_of(names), np.zeros(stop - start, np.uint64))
        batch = RecordBatch(segment, start, records)
        batches.append(batch)
        locations = np.arange(stop - start) + batch.first_location
        contents.deleted = np.concatenate([contents.deleted, locations])
    batches.sort(key=lambda batch: batch.first_row)


def _is_whole_page(page: bytes) -> bool:
    check = xxhash.xxh3_64_intdigest(page[:CHECKSUM_AT])
    return page[CHECKSUM_AT:] == check.to_bytes(8, "little")


def _plan_write(found: Structure, text: str, path: Path, content: bytes, offset: int) -> None:
    def write() -> None:
        descriptor = disk.open_write(path)
        try:
            disk.write(descriptor, [content], offset)
            if offset:  # a footer ends its file
                disk.truncate(path, offset + len(content))
            disk.sync(descriptor)
        finally:
            os.close(descriptor)

    found.mends.append((text, write))


def _write_json(folder: Path, layout: StoreLayout) -> None:
    """Replace `store.json`, whole or not at all."""
    path = folder / f"{STORE_JSON}.new"
    descriptor = disk.create(path)
    try:
        disk.write(descriptor, [layout.to_bytes()], 0)
        disk.sync(descriptor)
    finally:
        os.close(descriptor)
    disk.rename(path, folder / STORE_JSON)
    disk.sync_folder(folder)


def _leftovers(folder: Path, contents: Contents) -> Iterator[str]:
    """Name what lies in the folder and is of no use to the store."""
    used = {segment_name(segment) for segment in (*contents.segments, *contents.retired)}
    for path in sorted(folder.iterdir()):
        if path.name not in KNOWN:
            yield path.name
    for path in sorted((folder / SEGMENTS).glob("*")):
        if path.name not in used:
            yield f"{SEGMENTS}/{path.name}"
    for path in sorted((folder / INCOMING).glob("*")):
        yield f"{INCOMING}/{path.name} (waits to be committed)"
