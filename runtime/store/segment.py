"""Segment files being written: header page, records, footer; and where the next record goes."""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from ...errors import StoreError
from ...files import Closing
from . import disk
from .catalog import Catalog, CatalogState, Change, Segment
from .format import (
    FORMAT_VERSION,
    PAGE_BYTES,
    SEGMENTS,
    StoreLayout,
    header_fault,
    header_page,
    pages,
    segment_name,
)
from .records import (
    CHECKSUM_BYTES,
    DIGEST_BYTES,
    RecordBatch,
    RecordBytes,
    Records,
    batches_of,
)

# Linux takes at most 1,024 pieces a call; a padded record is two.
MAX_RECORDS_A_WRITE = 512
TRAILER = struct.Struct("<8sIIQQQQQQ")
FOOTER_MAGIC = b"EDJEFOOT"


def footer_bytes(records: Records, key: int) -> bytes:
    """Return the footer of the segment with this key that holds exactly `records`; whole pages."""
    content = b"".join([records.digests, records.checksums, records.packed_ids])
    check = xxhash.xxh3_64_intdigest(content)
    ids_bytes = len(records.packed_ids)
    values = (FOOTER_MAGIC, FORMAT_VERSION, 0, key, len(records), ids_bytes, check, 0)
    trailer = TRAILER.pack(*values, 0)[:-8]
    trailer += xxhash.xxh3_64_intdigest(trailer).to_bytes(8, "little")
    size = pages(len(content) + TRAILER.size)
    return content.ljust(size - TRAILER.size, b"\0") + trailer


def read_footer(
    descriptor: int, layout: StoreLayout, key: int | None = None
) -> tuple[int, Records] | str:
    """Return the key and the records that the footer of an open file names, or why it cannot.

    No size that it names is believed before it fits the file.

    Args:
        key: what the key must be; None takes any.

    Raises:
        OSError: the file cannot be read.
    """
    size = os.fstat(descriptor).st_size
    trailer = os.pread(descriptor, TRAILER.size, max(0, size - TRAILER.size))
    if len(trailer) < TRAILER.size or trailer[:8] != FOOTER_MAGIC:
        return "it has no footer"
    if trailer[-8:] != xxhash.xxh3_64_intdigest(trailer[:-8]).to_bytes(8, "little"):
        return "its footer is damaged (trailer)"
    _, version, _, found, num_rows, ids_bytes, check, _, _ = TRAILER.unpack(trailer)
    if version != FORMAT_VERSION or (key is not None and found != key):
        return f"its footer is another segment's (version {version}, key {found:016x})"
    length = num_rows * (DIGEST_BYTES + CHECKSUM_BYTES) + ids_bytes
    if num_rows > layout.max_rows or layout.end(num_rows) + pages(length + TRAILER.size) != size:
        return f"its footer is damaged: {num_rows} records do not fit the {size} bytes of the file"
    footer = os.pread(descriptor, size - layout.end(num_rows), layout.end(num_rows))
    content, padding = footer[:length], footer[length : -TRAILER.size]
    if xxhash.xxh3_64_intdigest(content) != check or any(padding):
        return "its footer is damaged (checksum)"
    return found, Records.unpack(content, num_rows)


class SegmentFile(Closing):
    """An open segment file. Nothing it writes counts before whoever owns it says so.

    All methods raise OSError where the disk cannot be written.
    """

    def __init__(self, path: Path, layout: StoreLayout, key: int, descriptor: int):
        self.key = key
        self._path, self._layout = path, layout
        self._descriptor: int | None = descriptor

    @classmethod
    def create(cls, path: Path, layout: StoreLayout) -> SegmentFile:
        """Make a segment file with its header page, durable with its name."""
        key, descriptor = secrets.randbits(64), disk.create(path)
        file = cls(path, layout, key, descriptor)
        try:
            disk.write(descriptor, [header_page(layout, key)], 0)
            disk.sync(descriptor)
            disk.sync_folder(path.parent)
        except BaseException:
            file.close()
            raise
        return file

    @classmethod
    def open(cls, path: Path, layout: StoreLayout, key: int) -> SegmentFile:
        """Open a segment file to write on.

        Raises:
            StoreError: its header page is damaged or another's.
        """
        descriptor = disk.open_write(path)
        fault = header_fault(os.pread(descriptor, PAGE_BYTES, 0), layout, key)
        if fault:
            os.close(descriptor)
            raise StoreError(
                f"cannot append to {path}: {fault}",
                hint=f"`edje store verify --repair {path.parent.parent}` mends a header page",
            )
        return cls(path, layout, key, descriptor)

    def put(self, row: int, records: RecordBytes) -> None:
        """Write records from `row` on; not yet on disk."""
        group = self._layout.group_records
        most, start = group or MAX_RECORDS_A_WRITE, 0
        while start < len(records.tokens):
            place = row + start
            stop = start + most - (place % most if group else 0)
            self._put_run(place, records.cut(start, stop))
            start = stop

    def sync(self) -> None:
        """Return when everything put is on disk."""
        disk.sync(self._open_descriptor())

    def seal(self, records: Records) -> None:
        """Write the footer of all `records` of the segment and return when it is on disk."""
        offset = self._layout.end(len(records))
        footer = footer_bytes(records, self.key)
        disk.write(self._open_descriptor(), [footer], offset)
        disk.truncate(self._path, offset + len(footer))  # what an unfinished append left
        self.sync()

    def close(self) -> None:
        """Close the file. Calling it twice is allowed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _put_run(self, row: int, records: RecordBytes) -> None:
        """Write records that lie without a gap, and the scales they share a page for."""
        descriptor, layout = self._open_descriptor(), self._layout
        pieces: list[memoryview | bytes] = [record.data for record in records.tokens]
        padding = bytes(layout.stride - layout.record_bytes)
        if padding:
            pieces = [part for record in pieces for part in (record, padding)]
        disk.write(descriptor, pieces, layout.offset(row))
        if records.scales is not None:
            scales = np.ascontiguousarray(records.scales)
            disk.write(descriptor, [scales.data.cast("B")], layout.scales_offset(row))

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise StoreError(f"{self._path} is closed")
        return self._descriptor


class Mark(NamedTuple):
    """Where the next record goes: a place to come back to when a change fails."""

    segment: int | None
    num_rows: int
    next_segment: int


class Appender(Closing):
    """Puts records behind the committed rows of the active segment, or into new segments.

    Nothing it writes exists before the catalog says so: after a failed or killed append the next
    one overwrites what was left.

    Attributes:
        mark: where the next record goes; its `segment` is None where the next one begins anew.
        keys: of every segment, by its number.
    """

    def __init__(self, folder: Path, layout: StoreLayout, state: CatalogState):
        self._folder, self._layout = folder / SEGMENTS, layout
        self.keys = {segment: info.key for segment, info in state.segments.items()}
        room = {
            segment: info.num_rows
            for segment, info in state.segments.items()
            if not info.sealed and info.num_rows < layout.max_rows
        }
        active = max(room, default=None)
        self.mark = Mark(active, room[active] if active else 0, state.next_segment)
        self._file: SegmentFile | None = None

    def rollback(self, mark: Mark) -> None:
        """Go back to `mark`, and give a full disk its space back."""
        self.close()
        with suppress(OSError):  # only space: the next append overwrites what stays
            for made in range(mark.next_segment, self.mark.next_segment):
                disk.unlink(self._folder / segment_name(made))
            if mark.segment is not None:
                path = self._folder / segment_name(mark.segment)
                disk.truncate(path, self._layout.end(mark.num_rows))
        self.mark = mark

    def write(self, ids: Sequence[str], digests: bytes, records: RecordBytes) -> list[RecordBatch]:
        """Write N records and return when their bytes are on disk (fdatasync).

        The returned batches become records when the catalog has committed them; until then the
        caller may `rollback` to the mark it took before.

        Raises:
            OSError: the bytes cannot be written.
            StoreError: the active segment is damaged.
        """
        sums = records.checksums(digests)
        batches, start = [], 0
        while start < len(ids):
            file, segment = self._open_active()
            row = self.mark.num_rows
            stop = min(len(ids), start + self._layout.max_rows - row)
            file.put(row, records.cut(start, stop))
            file.sync()
            part = digests[start * DIGEST_BYTES : stop * DIGEST_BYTES]
            packed = Records.pack(ids[start:stop], part, sums[start:stop])
            batches.append(RecordBatch(segment, row, packed))
            self.mark = self.mark._replace(num_rows=row + stop - start)
            start = stop
        return batches

    def segments_of(self, batches: Sequence[RecordBatch]) -> dict[int, Segment]:
        """Return the segments that `batches` were written to, as they are with them."""
        return {
            batch.segment: Segment(batch.stop_row, False, self.keys[batch.segment])
            for batch in batches
        }

    def start_anew(self) -> None:
        """Let the next record begin a new segment."""
        self.close()
        self.mark = self.mark._replace(segment=None)

    def take_number(self) -> int:
        """Return the number of a new segment, which somebody else will fill."""
        number = self.mark.next_segment
        self.mark = self.mark._replace(next_segment=number + 1)
        return number

    def close(self) -> None:
        """Close the open segment file. Calling it twice is allowed."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open_active(self) -> tuple[SegmentFile, int]:
        """Return the active segment's file and number; start the next when it is full."""
        segment, num_rows, following = self.mark
        if segment is None or num_rows >= self._layout.max_rows:
            self.close()
            path = self._folder / segment_name(following)
            self._file = SegmentFile.create(path, self._layout)
            self.keys[following] = self._file.key
            self.mark, segment = Mark(following, 0, following + 1), following
        elif self._file is None:
            path = self._folder / segment_name(segment)
            self._file = SegmentFile.open(path, self._layout, self.keys[segment])
        return self._file, segment


def seal(folder: Path, layout: StoreLayout, catalog: Catalog, segment: int, info: Segment) -> None:
    """Write the footer of a full segment and tell the catalog that it will not change any more.

    Raises:
        OSError: the footer cannot be written.
        StoreError: the catalog cannot be written, or it lacks records.
    """
    batches = catalog.batches(segment, info.num_rows)
    records = Records.join([batch.records for batch in batches])
    if len(records) != info.num_rows:
        raise StoreError(f"the catalog names {len(records)} of {info.num_rows} records")
    path = folder / SEGMENTS / segment_name(segment)
    with SegmentFile.open(path, layout, info.key) as file:
        file.seal(records)
    sealed = Segment(info.num_rows, True, info.key)
    rebatched = {segment: batches_of(segment, records)}
    catalog.commit(Change(segments={segment: sealed}, rebatched=rebatched))
