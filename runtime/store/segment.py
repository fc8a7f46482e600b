"""One segment file being written: header page, records with their scales, footer."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from ...arrays import UInt64
from ...errors import StoreError
from . import disk
from .format import PAGE_BYTES, StoreLayout, header_fault, header_page
from .records import Records, footer_bytes

Bytes = npt.NDArray[np.uint8]

# Linux takes at most 1,024 pieces a call; a padded record is two.
MAX_RECORDS_A_WRITE = 512


class RecordBytes(NamedTuple):
    """The bytes of N records: uint8 [N, record_bytes], and scales uint8 [N, scale_bytes] (int8)."""

    tokens: Bytes
    scales: Bytes | None

    def cut(self, start: int, stop: int) -> RecordBytes:
        """Return records `start` to `stop`; views."""
        scales = None if self.scales is None else self.scales[start:stop]
        return RecordBytes(self.tokens[start:stop], scales)

    def checksums(self, digests: bytes) -> UInt64:
        """Return the checksums uint64 [N] of records whose ids have these digests."""
        seeds = np.frombuffer(digests, ">u8")[1::2].tolist()
        hashed = xxhash.xxh3_64_intdigest
        if self.scales is not None:
            seeds = [hashed(row.data, seed) for row, seed in zip(self.scales, seeds, strict=True)]
        sums = (hashed(row.data, seed) for row, seed in zip(self.tokens, seeds, strict=True))
        return np.fromiter(sums, np.uint64, len(self.tokens))


class SegmentFile:
    """An open segment file. Nothing it writes counts before whoever owns it says so."""

    def __init__(self, path: Path, layout: StoreLayout, key: int, descriptor: int):
        self.path = path
        self.key = key
        self._layout = layout
        self._descriptor: int | None = descriptor

    @classmethod
    def create(cls, path: Path, layout: StoreLayout) -> SegmentFile:
        """Make a segment file with its header page, durable with its name.

        Raises:
            OSError: it cannot be written.
        """
        key = secrets.randbits(64)
        file = cls(path, layout, key, disk.create(path))
        try:
            disk.write(file._open_descriptor(), [header_page(layout, key)], 0)
            file.sync()
            disk.sync_folder(path.parent)
        except BaseException:
            file.close()
            raise
        return file

    @classmethod
    def open(cls, path: Path, layout: StoreLayout, key: int) -> SegmentFile:
        """Open a segment file to write on.

        Raises:
            OSError: it cannot be opened.
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
        """Write records from `row` on; not yet on disk.

        Raises:
            OSError: they cannot be written.
        """
        most = self._layout.group_records or MAX_RECORDS_A_WRITE
        start = 0
        while start < len(records.tokens):
            place = row + start
            stop = start + most - place % most if self._layout.group_records else start + most
            self._put_run(place, records.cut(start, stop))
            start = stop

    def sync(self) -> None:
        """Return when everything put is on disk."""
        disk.sync(self._open_descriptor())

    def seal(self, records: Records) -> None:
        """Write the footer of all `records` of the segment and return when it is on disk.

        Raises:
            OSError: it cannot be written; whatever of it stands in the file does not count.
        """
        offset = self._layout.end(len(records))
        footer = footer_bytes(records, self.key)
        disk.write(self._open_descriptor(), [footer], offset)
        disk.truncate(self.path, offset + len(footer))  # what an unfinished append left
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
            raise StoreError(f"{self.path} is closed")
        return self._descriptor
