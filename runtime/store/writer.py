"""Writing records: the lock of the one writer, and segment files made durable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from ...errors import StoreError
from ...folders import sync_folder
from ...locks import open_lock, try_lock
from .catalog import CatalogState, RecordBatch, UInt64, make_batch
from .layout import (
    LOCK,
    PAGE_BYTES,
    SEGMENTS,
    StoreLayout,
    header_fault,
    header_page,
    id_hash,
    segment_name,
)

# Linux takes at most 1,024 pieces a call; a padded record is two.
MAX_RECORDS_A_WRITE = 512


def lock_writer(folder: Path) -> int:
    """Take the writer's lock of a store; return the descriptor that holds it until closed.

    Raises:
        StoreError: another writer holds it, or the folder cannot be written.
    """
    try:
        descriptor = open_lock(folder / LOCK)
    except OSError as error:
        raise StoreError(
            f"cannot write the store {folder}: {error.strerror}",
            hint='make the folder writable, or open the store with mode="r"',
        ) from error
    owner = try_lock(descriptor)
    if owner is not None:
        os.close(descriptor)
        raise StoreError(
            f"the store {folder} has a writer already ({owner}); a store takes one at a time",
            hint="wait until it has finished; readers need not wait",
        )
    return descriptor


class SegmentWriter:
    """Puts records behind the committed rows of the active segment, or into new ones.

    Nothing it writes exists before the catalog says so: after a failed or killed append the
    next one overwrites what was left.
    """

    def __init__(self, folder: Path, layout: StoreLayout, state: CatalogState):
        self._folder = folder / SEGMENTS
        self._layout = layout
        self._segment = state.next_segment - 1 if state.active is None else state.active
        self._next_segment = state.next_segment
        full = state.active is None
        self._num_rows = layout.max_rows if full else state.segments[self._segment]
        self._descriptor: int | None = None

    def write(self, ids: tuple[str, ...], records: npt.NDArray[np.uint8]) -> list[RecordBatch]:
        """Write uint8 [N, record_bytes] and return when the bytes are on disk (fdatasync).

        The returned batches become records when the catalog has committed them.

        Raises:
            OSError: the bytes cannot be written; the rows are free for the next call.
            StoreError: the active segment is damaged.
        """
        before = (self._segment, self._num_rows, self._next_segment)
        sums = np.fromiter(map(_checksum, records, ids), dtype=np.uint64, count=len(ids))
        try:
            return list(self._write_segments(ids, records, sums))
        except BaseException:
            self._forget(*before)
            raise

    def close(self) -> None:
        """Close the open segment file. Calling it twice is allowed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _forget(self, segment: int, num_rows: int, next_segment: int) -> None:
        """Go back to where a failed write began, and give a full disk its space back."""
        self.close()
        with suppress(OSError):  # only space: the next append overwrites what stays
            for made in range(next_segment, self._next_segment):
                (self._folder / segment_name(made)).unlink()
            if num_rows < self._layout.max_rows:
                os.truncate(self._folder / segment_name(segment), self._layout.offset(num_rows))
        self._segment, self._num_rows, self._next_segment = segment, num_rows, next_segment

    def _write_segments(
        self, ids: tuple[str, ...], records: npt.NDArray[np.uint8], sums: UInt64
    ) -> Iterator[RecordBatch]:
        start = 0
        while start < len(ids):
            if self._num_rows >= self._layout.max_rows:
                self._start_segment()
            stop = start + min(len(ids) - start, self._layout.max_rows - self._num_rows)
            descriptor = self._open_active()
            _write_records(descriptor, self._layout, self._num_rows, records[start:stop])
            os.fdatasync(descriptor)
            yield make_batch(self._segment, self._num_rows, ids[start:stop], sums[start:stop])
            self._num_rows += stop - start
            start = stop

    def _start_segment(self) -> None:
        """Make the next segment file with its header page, durable with its name."""
        self.close()
        path = self._folder / segment_name(self._next_segment)
        # A file of this number can only be left over from an append that was never acknowledged.
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)
        self._segment, self._num_rows = self._next_segment, 0
        self._next_segment += 1
        _write_all(self._descriptor, [header_page(self._layout, self._segment)], 0)
        os.fdatasync(self._descriptor)
        sync_folder(self._folder)

    def _open_active(self) -> int:
        if self._descriptor is None:
            path = self._folder / segment_name(self._segment)
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            fault = header_fault(os.pread(descriptor, PAGE_BYTES, 0), self._layout, self._segment)
            if fault:
                os.close(descriptor)
                raise StoreError(f"cannot append to {path}: {fault}")
            self._descriptor = descriptor
        return self._descriptor


def _checksum(record: npt.NDArray[np.uint8], image_id: str) -> int:
    return int(xxhash.xxh3_64_intdigest(record.data, id_hash(image_id)))


def _write_records(
    descriptor: int, layout: StoreLayout, first_row: int, records: npt.NDArray[np.uint8]
) -> None:
    padding = bytes(layout.stride - layout.record_bytes)
    for start in range(0, len(records), MAX_RECORDS_A_WRITE):
        block = records[start : start + MAX_RECORDS_A_WRITE]
        pieces: list[memoryview | bytes] = [record.data for record in block]
        if padding:
            pieces = [part for record in pieces for part in (record, padding)]
        _write_all(descriptor, pieces, layout.offset(first_row + start))


def _write_all(descriptor: int, pieces: list[memoryview | bytes], offset: int) -> None:
    """Write `pieces` one after the other from `offset` on, however short each call falls."""
    written = os.pwritev(descriptor, pieces, offset)
    total = sum(map(len, pieces))
    if written == total:
        return
    rest = memoryview(b"".join(pieces))
    while written < total:
        written += os.pwrite(descriptor, rest[written:], offset + written)
