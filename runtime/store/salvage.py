"""What is still known of a store, whatever is damaged; and a catalog that says it anew.

`store.json` stands in the catalog too, every row of the catalog twice, the records of a sealed
segment in its footer, the sizes and the encoder in every header page.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...arrays import Int64
from ...errors import StoreError
from . import disk
from .catalog import Catalog, Change, Segment, batches_in, locations_in, segments_in, sqlite_errors
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
    SEGMENTS,
    StoreLayout,
    header_page,
    segment_name,
)
from .records import RecordBatch, Records, batches_of
from .segment import read_footer
from .tables import APPLICATION_ID, COPY, DAMAGE, SCHEMA_VERSION, CheckedTables, Row, sound_copy

REBUILT = "catalog.rebuilt"
DAMAGED = "catalog.sqlite.damaged"  # what SQLite could not open, kept aside


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

    @classmethod
    def of_nothing(cls, fault: str) -> Contents:
        """Return what is known where nothing of the catalog can be read."""
        lost = ["deletions: records that were deleted may be back"]
        return cls(generation=_late(), faults=[fault], lost=lost, lost_segments=True)

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


def _late() -> int:
    """Return a generation larger than any number of commits, so that older ones are told apart."""
    return int(time.time())


def read_contents(folder: Path) -> Contents:
    """Read every row of the catalog from both its tables; never raises for damage.

    Raises:
        StoreError: the catalog is another edje's, or cannot be read for another reason than damage.
    """
    path = folder / CATALOG
    if not path.is_file():
        return Contents.of_nothing(f"{CATALOG} is missing")
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
        return StoreLayout.read(folder), None
    except StoreError as error:
        layout = _layout_left(folder, contents)
        if layout is None:
            raise
        return layout, error.message


def add_sealed_segments(folder: Path, layout: StoreLayout, contents: Contents) -> list[Path]:
    """Add every segment that the catalog has lost and whose footer is whole; return the others."""
    left = []
    for segment, path in _segment_files(folder):
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


def keep_newest(contents: Contents) -> int:
    """Delete all but the last record of every id; return how many there were."""
    batches = [batch for many in contents.batches.values() for batch in many]
    locations = np.concatenate([np.empty(0, np.int64), *(batch.locations for batch in batches)])
    digests = np.concatenate(
        [np.empty((0, 2), np.uint64), *(batch.records.digest_array() for batch in batches)]
    ).astype(np.uint64)
    live = ~np.isin(locations, contents.deleted)
    locations, digests = locations[live], digests[live]
    order = np.lexsort((locations, digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    older = order[:-1][(ordered[1:] == ordered[:-1]).all(axis=1)]
    contents.deleted = np.concatenate([contents.deleted, locations[older]])
    return len(older)


def footer_of(path: Path, layout: StoreLayout, key: int | None = None) -> tuple[int, Records] | str:
    """Return what the footer of a segment file says, or why it says nothing."""
    try:
        with path.open("rb", buffering=0) as file:
            return read_footer(file.fileno(), layout, key)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _read_catalog(path: Path) -> Contents:
    contents = Contents()
    try:
        with closing(_connect(path)) as connection:
            _read_tables(connection, contents)
    except DAMAGE as error:
        if _is_busy(error):
            raise StoreError(f"cannot read {path}: {error}") from error
        return Contents.of_nothing(f"{CATALOG}: {error}")
    return contents


def _connect(path: Path) -> sqlite3.Connection:
    uri = path.absolute().as_uri()
    connection = sqlite3.connect(f"{uri}?mode=ro", uri=True, isolation_level=None)
    try:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except BaseException as error:
        connection.close()
        # See `catalog._connect`: a folder that nobody can write.
        if isinstance(error, sqlite3.OperationalError) and not _is_busy(error):
            return sqlite3.connect(f"{uri}?immutable=1", uri=True, isolation_level=None)
        raise
    return connection


def _read_tables(connection: sqlite3.Connection, contents: Contents) -> None:
    """Fill `contents` from both copies of every table, in one snapshot."""
    tables = CheckedTables(connection)
    connection.execute("BEGIN")
    head = _whole_rows(tables, "state")
    contents.segments = segments_in(_whole_rows(tables, "segments"))
    for batch in batches_in(_whole_rows(tables, "batches")):
        if batch.segment in contents.segments:
            contents.batches.setdefault(batch.segment, []).append(batch)
    contents.deleted = locations_in(_whole_rows(tables, "deletions"))
    contents.retired = dict(_whole_rows(tables, "retired"))
    try:
        for (text,) in connection.execute("PRAGMA quick_check(20)").fetchall():
            if text != "ok":
                tables.note(f"{CATALOG}: {text}")
    except DAMAGE as error:
        tables.note(f"{CATALOG}: {error}")
    _check_identity(tables, head)
    contents.faults += tables.faults
    _take_head(contents, head)


def _take_head(contents: Contents, head: Sequence[Row]) -> None:
    """Compare what was found with what the state counts."""
    if len(head) != 1:
        contents.lost.append(f"the state of the catalog ({len(head)} whole rows, expected 1)")
        contents.lost_segments, contents.generation = True, _late()
        return
    contents.generation, contents.next_segment, num_segments, num_deleted, store_json = head[0]
    contents.store_json = store_json
    if len(contents.segments) < num_segments:
        contents.lost_segments = True
        contents.lost.append(f"{num_segments - len(contents.segments)} segments of the catalog")
    if len(contents.deleted) < num_deleted:
        gone = num_deleted - len(contents.deleted)
        contents.lost.append(f"{gone} deletions: records that were deleted may be back")


def _whole_rows(tables: CheckedTables, table: str) -> list[Row]:
    """Return every row that one of the two copies has whole; note those that one lacks."""
    rows = tables.merged_rows(table)
    for name in (table, table + COPY):
        with suppress(*DAMAGE):  # noted already
            (count,) = tables.connection.execute(f"SELECT count(*) FROM {name}").fetchone()
            if count != len(rows):
                tables.note(f"table {name}: {count} rows, expected {len(rows)}")
    return rows


def _check_identity(tables: CheckedTables, head: Sequence[Row]) -> None:
    """Note damage to the numbers that say what the file is; refuse a file of another edje."""
    for name, expected in (("application_id", APPLICATION_ID), ("user_version", SCHEMA_VERSION)):
        (got,) = tables.connection.execute(f"PRAGMA {name}").fetchone()
        if got != expected:
            tables.note(f"{CATALOG}: its {name} is {got}, expected {expected}")
            if not head and name == "user_version" and got > expected:
                raise StoreError(
                    f"the catalog has schema version {got}, this edje reads {expected}",
                    hint="verify the store with the edje that wrote it last",
                )


def _is_busy(error: Exception) -> bool:
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
    files = list(_segment_files(folder))
    largest = max([DEFAULT_SEGMENT_BYTES, *(path.stat().st_size for _, path in files)])
    layouts = (_layout_of_header(path, largest) for _, path in files)
    return next((layout for layout in layouts if layout), None)


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


def _segment_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield number and path of every file that is called as a segment is, by number."""
    for path in sorted((folder / SEGMENTS).glob("*.tokens")):
        if path.stem.isdecimal() and path.name == segment_name(int(path.stem)):
            yield int(path.stem), path


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
        if _is_busy(error):
            raise
        return False
    return True


def _put_in_place(folder: Path) -> None:
    """Rename the rebuilt catalog to where one was that SQLite cannot open; keep that one aside."""
    with disk.closed_after(disk.open_write(folder / REBUILT)) as descriptor:
        disk.sync(descriptor)
    path, aside = folder / CATALOG, folder / DAMAGED
    if path.exists():  # it stays where it is until the new one takes its place
        disk.unlink(aside)
        disk.link(path, aside)
    _remove_log(path)  # another catalog's log would be played into the new one
    disk.rename(folder / REBUILT, path)
    disk.sync_folder(folder)


def _remove(path: Path) -> None:
    """Remove a catalog and SQLite's files beside it."""
    _remove_log(path)
    disk.unlink(path)


def _remove_log(path: Path) -> None:
    for suffix in ("-wal", "-shm"):
        disk.unlink(path.with_name(path.name + suffix))
