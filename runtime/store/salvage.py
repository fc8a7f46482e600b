"""What is still known of a store, whatever is damaged: read from every copy of it.

`store.json` stands in the catalog too, every row of the catalog twice, the records of a sealed
segment in its footer, the sizes and the encoder in every header page.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...arrays import Int64
from ...errors import StoreError
from .catalog import APPLICATION_ID, ROWS_A_BATCH, SCHEMA_VERSION, RecordBatch, Segment, sound_copy
from .format import (
    CATALOG,
    DEFAULT_SEGMENT_BYTES,
    DTYPES,
    FINGERPRINT_AT,
    FORMAT_VERSION,
    HEADER,
    MAGIC,
    MAX_FINGERPRINT_BYTES,
    PAGE_BYTES,
    ROW_BITS,
    ROW_MASK,
    SEGMENTS,
    StoreLayout,
    header_page,
    segment_name,
)
from .records import Records, read_footer
from .tables import COPY, DAMAGE, CheckedTables


@dataclass(slots=True)
class Contents:
    """Everything a catalog says, and what was found wrong with it.

    Attributes:
        store_json: the copy of `store.json`; empty where it is lost.
        generation: 0 where it is lost.
        faults: damage of the catalog, in words.
        lost: what no copy has any more, in words.
        lost_segments: whether segments may be missing here.
    """

    store_json: bytes = b""
    generation: int = 0
    next_segment: int = 1
    segments: dict[int, Segment] = field(default_factory=dict)
    batches: dict[int, list[RecordBatch]] = field(default_factory=dict)
    deleted: Int64 = field(default_factory=lambda: np.empty(0, np.int64))
    retired: dict[int, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    lost_segments: bool = False

    @property
    def is_damaged(self) -> bool:
        """Whether the catalog must be written anew."""
        return bool(self.faults or self.lost)

    def lose_all(self, fault: str) -> None:
        """Note that nothing of the catalog can be read."""
        self.faults.append(fault)
        self.lost.append("deletions: records that were deleted may be back")
        self.lost_segments = True
        # Larger than any number of commits, so that readers of older generations are told apart.
        self.generation = int(time.time())

    def live_locations(self) -> Int64:
        """Return int64 [N]: the row handles of the records that are not deleted."""
        spans = [
            np.arange(batch.first_location, batch.first_location + len(batch.records))
            for batches in self.batches.values()
            for batch in batches
        ]
        found = np.concatenate([np.empty(0, np.int64), *spans])
        return found[~np.isin(found, self.deleted)]

    def drop(self, segment: int) -> list[tuple[int, str]]:
        """Forget a segment; return row and id of its live records."""
        dead = set(self.deleted[self.deleted >> ROW_BITS == segment].tolist())
        found = [
            (batch.first_row + place, image_id)
            for batch in self.batches.pop(segment, [])
            for place, image_id in enumerate(batch.records.ids())
            if batch.first_location + place not in dead
        ]
        del self.segments[segment]
        self.deleted = self.deleted[self.deleted >> ROW_BITS != segment]
        return found


def read_contents(folder: Path) -> Contents:
    """Read every row of the catalog from both its tables; never raises for damage.

    Raises:
        StoreError: the catalog is another edje's, or cannot be read for another reason than damage.
    """
    path = folder / CATALOG
    if not path.is_file():
        contents = Contents()
        contents.lose_all(f"{CATALOG} is missing")
        return contents
    contents = _read_catalog(path)
    if contents.lost:
        with sound_copy(path) as copy:
            better = _read_catalog(copy)
        if len(better.lost) < len(contents.lost) or contents.lost_segments > better.lost_segments:
            better.faults = list(dict.fromkeys([*contents.faults, *better.faults]))
            return better
    return contents


def layout_of(folder: Path, contents: Contents) -> tuple[StoreLayout, str | None]:
    """Return the layout of the store, and what is wrong with its `store.json`.

    Raises:
        StoreError: no store there, another version's, or nothing is left that says the layout.
    """
    try:
        layout = StoreLayout.read(folder)
    except StoreError as error:
        layout_left = _layout_left(folder, contents)
        if layout_left is None:
            raise
        return layout_left, error.message
    return layout, None


def add_sealed_segments(folder: Path, layout: StoreLayout, contents: Contents) -> list[Path]:
    """Add every segment that the catalog has lost and whose footer is whole; return the others."""
    left = []
    for segment, path in segment_files(folder):
        contents.next_segment = max(contents.next_segment, segment + 1)
        if segment in contents.segments or segment in contents.retired:
            continue
        found = footer_of(path, layout)
        if isinstance(found, str):
            left.append(path)
            most = max(0, (path.stat().st_size - PAGE_BYTES) // layout.stride)
            while most and layout.end(most) > path.stat().st_size:  # pages of scales are no records
                most -= 1
            contents.lost.append(
                f"the ids of the records of segment {segment} ({most} at most): it was not sealed, "
                f"so only the catalog knew them"
            )
            continue
        key, records = found
        contents.segments[segment] = Segment(len(records), True, key)
        contents.batches[segment] = batches_of(segment, records)
    return left


def batches_of(segment: int, records: Records) -> list[RecordBatch]:
    """Return all records of a sealed segment as the catalog keeps them."""
    parts = records.split(ROWS_A_BATCH)
    return [RecordBatch(segment, at * ROWS_A_BATCH, part) for at, part in enumerate(parts)]


def keep_newest(contents: Contents) -> int:
    """Delete all but the last record of every id; return how many there were."""
    locations = contents.live_locations()
    batches = [batch for many in contents.batches.values() for batch in many]
    batches.sort(key=lambda batch: batch.first_location)
    locations.sort()
    digests = np.concatenate(
        [np.empty((0, 2), np.uint64), *(batch.records.digest_array() for batch in batches)]
    )
    everywhere = np.concatenate(
        [
            np.empty(0, np.int64),
            *(np.arange(len(batch.records)) + batch.first_location for batch in batches),
        ]
    )
    digests = digests[np.isin(everywhere, locations)].astype(np.uint64)
    order = np.lexsort((locations, digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    older = order[:-1][(ordered[1:] == ordered[:-1]).all(axis=1)]
    contents.deleted = np.concatenate([contents.deleted, locations[older]])
    return len(older)


def footer_of(path: Path, layout: StoreLayout, key: int | None = None) -> tuple[int, Records] | str:
    """Return what the footer of a segment file says, or why it says nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    try:
        return read_footer(descriptor, layout, key)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    finally:
        os.close(descriptor)


def _read_catalog(path: Path) -> Contents:
    contents = Contents()
    try:
        with closing(_connect(path)) as connection:
            _read_tables(connection, contents)
    except DAMAGE as error:
        if is_busy(error):
            raise StoreError(f"cannot read {path}: {error}") from error
        contents = Contents()
        contents.lose_all(f"{CATALOG}: {error}")
    return contents


def _connect(path: Path) -> sqlite3.Connection:
    uri = path.absolute().as_uri()
    connection = sqlite3.connect(f"{uri}?mode=ro", uri=True, isolation_level=None)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        if not is_busy(error):  # see `catalog._connect`: a folder that nobody can write
            return sqlite3.connect(f"{uri}?immutable=1", uri=True, isolation_level=None)
        raise
    except BaseException:
        connection.close()
        raise
    return connection


def _read_tables(connection: sqlite3.Connection, contents: Contents) -> None:
    """Fill `contents` from both copies of every table, in one snapshot."""
    tables = CheckedTables(connection)
    connection.execute("BEGIN")
    head = _whole_rows(tables, "state")
    segments = _whole_rows(tables, "segments")
    batches = _whole_rows(tables, "batches")
    deletions = _whole_rows(tables, "deletions")
    contents.retired = dict(_whole_rows(tables, "retired"))
    try:
        for (text,) in connection.execute("PRAGMA quick_check(20)").fetchall():
            if text != "ok":
                tables.note(f"{CATALOG}: {text}")
    except DAMAGE as error:
        tables.note(f"{CATALOG}: {error}")
    _check_identity(connection, tables, head)
    contents.faults += tables.faults
    contents.segments = {
        row[0]: Segment(row[1], bool(row[2]), row[3] % (1 << 64)) for row in segments
    }
    contents.deleted = np.concatenate(
        [np.empty(0, np.int64), *(np.frombuffer(blob, "<i8") for _, blob in deletions)]
    )
    for location, ids, digests, checksums in batches:
        batch = RecordBatch(
            location >> ROW_BITS, location & ROW_MASK, Records(ids, digests, checksums)
        )
        if batch.segment in contents.segments and batch.records.is_sound():
            contents.batches.setdefault(batch.segment, []).append(batch)
    _take_head(contents, head)


def _take_head(contents: Contents, head: Sequence[tuple[int, int, int, int, bytes]]) -> None:
    """Compare what was found with what the state counts."""
    if len(head) != 1:
        contents.lost.append(f"the state of the catalog ({len(head)} whole rows, expected 1)")
        contents.lost_segments = True
        contents.generation = int(time.time())
        return
    contents.generation, contents.next_segment, num_segments, num_deleted, store_json = head[0]
    contents.store_json = store_json
    if len(contents.segments) < num_segments:
        contents.lost_segments = True
        contents.lost.append(f"{num_segments - len(contents.segments)} segments of the catalog")
    if len(contents.deleted) < num_deleted:
        gone = num_deleted - len(contents.deleted)
        contents.lost.append(f"{gone} deletions: records that were deleted may be back")


def _whole_rows(tables: CheckedTables, table: str) -> list[tuple[Any, ...]]:
    """Return every row that one of the two copies has whole; note those that one lacks."""
    rows = tables.merged_rows(table)
    for name in (table, table + COPY):
        with suppress(*DAMAGE):  # noted already
            (count,) = tables.connection.execute(f"SELECT count(*) FROM {name}").fetchone()
            if count != len(rows):
                tables.note(f"table {name}: {count} rows, expected {len(rows)}")
    return rows


def _check_identity(
    connection: sqlite3.Connection, tables: CheckedTables, head: Sequence[tuple[Any, ...]]
) -> None:
    """Note damage to the numbers that say what the file is; refuse a file of another edje."""
    for name, expected in (("application_id", APPLICATION_ID), ("user_version", SCHEMA_VERSION)):
        (got,) = connection.execute(f"PRAGMA {name}").fetchone()
        if got != expected:
            tables.note(f"{CATALOG}: its {name} is {got}, expected {expected}")
            if not head and name == "user_version" and got > expected:
                raise StoreError(
                    f"the catalog has schema version {got}, this edje reads {expected}",
                    hint="verify the store with the edje that wrote it last",
                )


def is_busy(error: Exception) -> bool:
    """Return whether SQLite failed for a reason that is no damage of the file."""
    text = str(error)
    return any(
        words in text for words in ("locked", "disk I/O", "full", "readonly", "out of memory")
    )


def _layout_left(folder: Path, contents: Contents) -> StoreLayout | None:
    """Return the layout from the catalog's copy of `store.json`, else from a header page."""
    if contents.store_json:
        with suppress(StoreError):
            return StoreLayout.parse(contents.store_json, folder / CATALOG)
    files = list(segment_files(folder))
    largest = max([path.stat().st_size for _, path in files], default=0)
    for _, path in files:
        layout = _layout_of_header(path, max(DEFAULT_SEGMENT_BYTES, largest))
        if layout is not None:
            return layout
    return None


def _layout_of_header(path: Path, segment_bytes: int) -> StoreLayout | None:
    """Return the layout that a whole header page of this version says."""
    try:
        with path.open("rb") as file:
            page = file.read(PAGE_BYTES)
    except OSError:
        return None
    if len(page) < PAGE_BYTES or page[:8] != MAGIC:
        return None
    _, version, _, code, num_tokens, hidden, _, _, _, _, key = HEADER.unpack_from(page)
    names = {code: name for name, (code, _, _) in DTYPES.items()}
    if version != FORMAT_VERSION or code not in names:
        return None
    text = page[FINGERPRINT_AT : FINGERPRINT_AT + MAX_FINGERPRINT_BYTES].rstrip(b"\0")
    fingerprint = text.decode(errors="replace")
    layout = StoreLayout(
        num_tokens, hidden, names[code], fingerprint, segment_bytes, "edje store verify --repair"
    )
    return layout if not layout.faults() and header_page(layout, key) == page else None


def segment_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield number and path of every file that is called as a segment is, by number."""
    for path in sorted((folder / SEGMENTS).glob("*.tokens")):
        if path.stem.isdecimal() and path.name == segment_name(int(path.stem)):
            yield int(path.stem), path
