"""Taking in segments that other processes wrote: checked whole, then linked, then committed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import StoreError, named
from . import disk
from .catalog import ROWS_A_BATCH, Change, RecordBatch, Segment
from .changes import StoreWriter
from .footer import read_footer
from .index import RecordIndex
from .layout import (
    PAGE_BYTES,
    ROW_BITS,
    SEGMENTS,
    StoreLayout,
    header_fault,
    is_id,
    segment_name,
)
from .records import Records, digests_of
from .segment_file import RecordBytes

RECORDS_A_READ = 256


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What `commit_segments` did.

    Attributes:
        num_added: records that the store has now.
        num_present: records whose ids it had already; they were left out.
        segments: numbers of the segments it took in.
    """

    num_added: int
    num_present: int
    segments: tuple[int, ...]


def commit_segments(writer: StoreWriter, index: RecordIndex, paths: Sequence[Path]) -> CommitReport:
    """Add the records of sealed segment files, one commit a file; then remove the files.

    Raises:
        StoreError: a file that is no whole segment of this store, or holds a damaged record (named,
            with all its faults). The files before it were committed, it was not.
    """
    added, present, taken = 0, 0, []
    for path in paths:
        key, records = _checked(path, writer.layout)
        ids = records.ids()
        rows, _ = index.rows(ids)
        old = rows >= 0
        present += int(np.count_nonzero(old))
        if not old.all():
            segment = _commit(writer, index, path, key, records, ids, old)
            taken.append(segment)
            added += int(np.count_nonzero(~old))
        with suppress(OSError):  # it is in the store: whoever commits it again adds nothing
            disk.unlink(path)
    return CommitReport(added, present, tuple(taken))


def _commit(
    writer: StoreWriter,
    index: RecordIndex,
    path: Path,
    key: int,
    records: Records,
    ids: Sequence[str],
    old: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> int:
    """Link one checked file into the store and commit it, without the records that are `old`."""
    with writer.writing("add a segment to"):
        segment = writer.appender.take_number()
        target = writer.folder / SEGMENTS / segment_name(segment)
        disk.unlink(target)
        _link(path, target)
        disk.sync_folder(target.parent)
    parts = records.split(ROWS_A_BATCH)
    batches = [RecordBatch(segment, at * ROWS_A_BATCH, part) for at, part in enumerate(parts)]
    locations = np.flatnonzero(old) + (segment << ROW_BITS)
    info = Segment(len(records), True, key)
    writer.commit(Change(batches, {segment: info}, locations))
    index.add(batches, ids, locations)
    return segment


def _link(source: Path, target: Path) -> None:
    """Give the file a name in the store; copy it where that cannot be (another file system)."""
    try:
        disk.link(source, target)
    except OSError:
        descriptor = disk.create(target)
        try:
            with source.open("rb") as file:
                offset = 0
                while content := file.read(1 << 24):
                    disk.write(descriptor, [content], offset)
                    offset += len(content)
            disk.sync(descriptor)
        finally:
            os.close(descriptor)


def _checked(path: Path, layout: StoreLayout) -> tuple[int, Records]:
    """Return key and records of a segment file after reading every byte of it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"cannot read the segment {path}: {error.strerror}") from error
    try:
        found = read_footer(descriptor, layout)
        if isinstance(found, str):
            raise _refused(path, [found])
        key, records = found
        fault = header_fault(os.pread(descriptor, PAGE_BYTES, 0), layout, key) or _id_fault(records)
        faults = [fault] if fault else _damaged_records(descriptor, layout, records)
        if faults:
            raise _refused(path, faults)
    except OSError as error:
        raise _refused(path, [f"cannot be read ({error.strerror})"]) from error
    finally:
        os.close(descriptor)
    return key, records


def _id_fault(records: Records) -> str | None:
    """Return why these are no ids with their digests, each once, or None."""
    try:
        ids = records.ids()
    except StoreError as error:
        return error.message
    wrong = [image_id for image_id in ids if not is_id(image_id)]
    if wrong or digests_of(ids) != records.digests:
        return f"its footer names ids that are none, or others than its digests: {named(wrong)}"
    if len(set(ids)) < len(ids):
        return "an id comes twice in it"
    return None


def _damaged_records(descriptor: int, layout: StoreLayout, records: Records) -> list[str]:
    """Return one sentence for every record that does not fit its checksum."""
    faults, ids, sums = [], records.ids(), records.checksum_array()
    for start in range(0, len(records), RECORDS_A_READ):
        stop = min(start + RECORDS_A_READ, len(records))
        found = _read(descriptor, layout, start, stop)
        wrong = found.checksums(records.digests[16 * start : 16 * stop]) != sums[start:stop]
        bad = (np.flatnonzero(wrong) + start).tolist()
        faults += [f"id {ids[row]!r}, row {row}: its bytes do not fit its checksum" for row in bad]
    return faults


def _read(descriptor: int, layout: StoreLayout, start: int, stop: int) -> RecordBytes:
    """Read the bytes of rows [start, stop); what the file lacks is zero."""
    tokens = np.zeros((stop - start, layout.record_bytes), np.uint8)
    scales = np.zeros((stop - start, layout.scale_bytes), np.uint8) if layout.scale_bytes else None
    for row in range(start, stop):
        os.preadv(descriptor, [tokens[row - start].data], layout.offset(row))
        if scales is not None:
            os.preadv(descriptor, [scales[row - start].data], layout.scales_offset(row))
    return RecordBytes(tokens, scales)


def _refused(path: Path, faults: Sequence[str]) -> StoreError:
    return StoreError(
        f"{path} cannot be added to the store",
        faults=[*faults[:20], *([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])],
        hint="let its task write the segment again; the same store's layout makes it fit",
    )
