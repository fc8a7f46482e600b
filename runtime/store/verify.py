"""`verify`: every byte of a store against what is known of it; `--repair`: mend what can be mended.

What is known twice is mended from the other copy: `store.json`, header pages, footers, rows of the
catalog. A record is known once: a damaged one is taken out, so that indexing makes it anew.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...arguments import Progress
from ...errors import StoreError
from . import disk
from .catalog import Segment, gaps_of
from .format import (
    CATALOG,
    INCOMING,
    LOCK,
    PAGE_BYTES,
    READERS,
    SEGMENTS,
    STORE_JSON,
    StoreLayout,
    header_fault,
    header_page,
    is_whole_page,
    segment_name,
)
from .records import BadRecord, RecordBatch, Records, batches_of, digests_of
from .salvage import (
    Contents,
    add_sealed_segments,
    footer_of,
    keep_newest,
    layout_of,
    read_contents,
    write_contents,
)
from .segment import footer_bytes
from .store import TokenStore

BATCH_BYTES = 16 << 20
KNOWN = {STORE_JSON, CATALOG, f"{CATALOG}-wal", f"{CATALOG}-shm", SEGMENTS, INCOMING, LOCK, READERS}
KNOWN |= {"skipped.jsonl"}  # written by `edje index`
UNSEALED = ".lost"  # behind the name of a segment file whose ids are lost


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify_store` found, and with `repair` what it did.

    Attributes:
        num_records: live records when it was done.
        num_checked: records whose bytes were compared with their checksum; `read_bytes` of them.
        damaged: records that are not whole; after a repair they are no longer in the store.
        faults: other damage, in words.
        repaired: what was mended, in words.
        leftovers: files that the store does not need; they do no harm.
        is_clean: no damage, or all of it was mended.
    """

    path: str
    num_records: int
    num_segments: int
    num_checked: int
    read_bytes: int
    seconds: float
    damaged: tuple[BadRecord, ...]
    faults: tuple[str, ...]
    repaired: tuple[str, ...]
    leftovers: tuple[str, ...]
    is_clean: bool

    @property
    def bad(self) -> tuple[str, ...]:
        """The ids of the damaged records."""
        return tuple(record.id for record in self.damaged)

    @property
    def bytes_per_s(self) -> float:
        """How fast records were read and compared, together with everything else."""
        return self.read_bytes / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        damaged = [str(record) for record in self.damaged]
        values = {**asdict(self), "bytes_per_s": self.bytes_per_s}
        return {**values, "damaged": damaged, "bad": list(self.bad)}


def verify_store(
    path: str | os.PathLike[str], *, repair: bool = False, progress: Progress | None = None
) -> VerifyReport:
    """Check every file of a store: catalog, header pages, footers, every live record.

    Args:
        path: the store's folder; others may read and, without `repair`, write it meanwhile.
        repair: mend what can be mended and take damaged records out. Whole records stay as they
            are; records that cannot be read for another reason than damage stay too.
        progress: called with (records done, records in all).

    Raises:
        StoreError: no store there, another version's; with `repair`, another writer, or a disk
            that cannot be written.
    """
    folder, started = Path(path), time.perf_counter()
    if not any((folder / name).exists() for name in (STORE_JSON, CATALOG, SEGMENTS)):
        StoreLayout.read(folder)  # says that there is no store
    # Be the one writer, or keep every file that the store has now.
    with disk.lock_writer(folder) if repair else disk.lock_reader(folder):
        structure = inspect(folder)
        leftovers = tuple(_leftovers(folder, structure.contents))
        repaired = structure.mend() if repair else []
        # What stays wrong after mending needs a person.
        left = inspect(folder).faults if repaired else structure.faults
    checked = _check_records(structure, repair, progress)
    # Without a repair, the records of a missing file were tried to be read as well.
    damaged = {(record.segment, record.row): record for record in checked.damaged}
    damaged |= {(record.segment, record.row): record for record in structure.damaged}
    num_dropped = len(structure.damaged) + len(checked.dropped)
    if repair and num_dropped:
        repaired.append(f"{num_dropped} damaged records were taken out")
    is_clean = not left and not checked.faults and len(checked.dropped) == len(checked.damaged)
    return VerifyReport(
        path=str(folder),
        num_records=checked.num_left,
        num_segments=len(structure.contents.segments),
        num_checked=checked.num_checked,
        read_bytes=checked.num_checked * _bytes_of(structure.layout),
        seconds=time.perf_counter() - started,
        damaged=tuple(damaged[place] for place in sorted(damaged)),
        faults=(*structure.faults, *checked.faults),
        repaired=tuple(repaired),
        leftovers=leftovers,
        is_clean=is_clean and (repair or not damaged),
    )


@dataclass(slots=True)
class _Checked:
    """What a pass over all live records found, and how many are left after it."""

    num_checked: int = 0
    num_left: int = 0
    damaged: list[BadRecord] = field(default_factory=list)
    dropped: list[BadRecord] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def _check_records(structure: Structure, repair: bool, progress: Progress | None) -> _Checked:
    """Read every record; with `repair`, take the damaged ones out."""
    checked = _Checked()
    try:
        store = TokenStore.open(structure.folder, mode="a" if repair else "r")
    except StoreError as error:
        if repair:
            raise
        checked.faults.append(f"no record could be checked: {error.message}")
        return checked
    with store:
        for batch in store.iterate(max(1, BATCH_BYTES // _bytes_of(store.layout)), bad="mark"):
            checked.num_checked += len(batch.ids)
            checked.damaged += batch.bad
            if progress is not None:
                progress(checked.num_checked, len(store))
        if repair:  # nothing of a file that is only out of reach
            unreachable = structure.out_of_reach
            checked.dropped = [each for each in checked.damaged if each.segment not in unreachable]
            store.delete([record.id for record in checked.dropped])
        checked.num_left = len(store)
    return checked


def _bytes_of(layout: StoreLayout) -> int:
    return layout.record_bytes + layout.scale_bytes


@dataclass(slots=True)
class Structure:
    """What `inspect` found.

    Attributes:
        contents: what the catalog says or, where it is damaged, must say.
        faults: damage, in words.
        damaged: records of files that are gone.
        out_of_reach: segments whose files are there but cannot be used as they are.
        mends: what can be mended, in words, and how.
    """

    folder: Path
    layout: StoreLayout
    contents: Contents
    faults: list[str] = field(default_factory=list)
    damaged: list[BadRecord] = field(default_factory=list)
    out_of_reach: set[int] = field(default_factory=set)
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
    if contents.faults or contents.lost or found.damaged:
        found.mends.append(
            (f"{CATALOG} was written anew", partial(write_contents, folder, contents))
        )
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
        if is_whole_page(page):  # another file in its place: none of its bytes is damaged
            found.out_of_reach.add(segment)
            return
        write = partial(_write_at, path, header_page(found.layout, info.key), 0)
        found.mends.append((f"segment {segment}: its header page was written anew", write))
    _inspect_rows(found, path, segment, info, found.layout.end(info.num_rows) - size)


def _inspect_rows(
    found: Structure, path: Path, segment: int, info: Segment, missing_bytes: int
) -> None:
    """Compare length, rows and footer of a segment file with the catalog."""
    contents, end = found.contents, found.layout.end(info.num_rows)
    footer = footer_of(path, found.layout, info.key) if info.sealed else ""
    gaps = gaps_of(contents.batches.get(segment, []), info.num_rows)
    if gaps:
        _fill_gaps(contents, segment, gaps, None if isinstance(footer, str) else footer[1])
    if missing_bytes > 0:
        found.faults.append(f"segment {segment}: the file ends {missing_bytes} bytes early")
    if not info.sealed:
        if missing_bytes > 0:
            text = f"segment {segment}: zeros stand for the bytes that are gone"
            found.mends.append((text, partial(disk.truncate, path, end)))
        return
    parts = [batch.records for batch in contents.batches[segment]]
    if isinstance(footer, str):
        fault = footer
    else:
        digests = b"".join(part.digests for part in parts)
        sums = b"".join(part.checksums for part in parts)
        is_same = (footer[1].digests, footer[1].checksums) == (digests, sums)
        fault = "" if is_same else "its footer names other records than the catalog"
    if fault:
        found.faults.append(f"segment {segment}: {fault}")
        write = partial(_write_at, path, footer_bytes(Records.join(parts), info.key), end)
        found.mends.append((f"segment {segment}: its footer was written anew", write))


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
        batches.append(RecordBatch(segment, start, records))
        contents.deleted = np.concatenate([contents.deleted, batches[-1].locations])
    batches.sort(key=lambda batch: batch.first_row)


def _write_at(path: Path, content: bytes, offset: int) -> None:
    """Write a header page (at 0) or a footer, which ends its file."""
    with disk.closed_after(disk.open_write(path)) as descriptor:
        disk.write(descriptor, [content], offset)
        if offset:
            disk.truncate(path, offset + len(content))
        disk.sync(descriptor)


def _write_json(folder: Path, layout: StoreLayout) -> None:
    """Replace `store.json`, whole or not at all."""
    path = folder / f"{STORE_JSON}.new"
    with disk.closed_after(disk.create(path)) as descriptor:
        disk.write(descriptor, [layout.to_bytes()], 0)
        disk.sync(descriptor)
    disk.rename(path, folder / STORE_JSON)
    disk.sync_folder(folder)


def _leftovers(folder: Path, contents: Contents) -> Iterator[str]:
    """Name what lies in the folder and is of no use to the store."""
    used = {segment_name(segment) for segment in (*contents.segments, *contents.retired)}
    yield from sorted(path.name for path in folder.iterdir() if path.name not in KNOWN)
    for path in sorted((folder / SEGMENTS).glob("*")):
        if path.name not in used:
            yield f"{SEGMENTS}/{path.name}"
    for path in sorted((folder / INCOMING).glob("*")):
        yield f"{INCOMING}/{path.name} (waits to be committed)"
