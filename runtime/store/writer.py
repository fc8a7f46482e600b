"""Records behind the committed rows of the active segment, or in new ones, durable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ...errors import StoreError
from ...locks import LOCKS_HINT, lock_fault, open_lock, try_lock
from . import disk
from .catalog import ROWS_A_BATCH, Catalog, CatalogState, Change, RecordBatch, Segment
from .layout import LOCK, SEGMENTS, StoreLayout, segment_name
from .records import DIGEST_BYTES, Records
from .segment_file import RecordBytes, SegmentFile


def lock_writer(folder: Path) -> int:
    """Take the writer's lock of a store; return the descriptor that holds it until closed.

    Raises:
        StoreError: another writer holds it, the folder cannot be written, or its file system
            offers no locks.
    """
    try:
        descriptor = open_lock(folder / LOCK)
    except OSError as error:
        raise StoreError(
            f"cannot write the store {folder}: {error.strerror}",
            hint='make the folder writable, or open the store with mode="r"',
        ) from error
    try:
        owner = try_lock(descriptor)
    except OSError as error:
        os.close(descriptor)
        raise StoreError(lock_fault(folder / LOCK, error), hint=LOCKS_HINT) from error
    if owner is not None:
        os.close(descriptor)
        raise StoreError(
            f"the store {folder} has a writer already ({owner}); a store takes one at a time",
            hint="wait until it has finished; readers need not wait",
        )
    return descriptor


class Mark(NamedTuple):
    """Where the next record goes: a place to come back to when a change fails."""

    segment: int | None
    num_rows: int
    next_segment: int


class Appender:
    """Puts records behind the committed rows of the active segment, or into new segments.

    Nothing it writes exists before the catalog says so: after a failed or killed append the next
    one overwrites what was left.
    """

    def __init__(self, folder: Path, layout: StoreLayout, state: CatalogState):
        self._folder = folder / SEGMENTS
        self._layout = layout
        self._keys = {segment: info.key for segment, info in state.segments.items()}
        room = [
            segment
            for segment, info in state.segments.items()
            if not info.sealed and info.num_rows < layout.max_rows
        ]
        self._segment = max(room, default=None)
        self._num_rows = state.segments[self._segment].num_rows if self._segment else 0
        self._next_segment = state.next_segment
        self._file: SegmentFile | None = None

    @property
    def active(self) -> int | None:
        """The segment that takes the next record, if there is one with room."""
        return self._segment

    def mark(self) -> Mark:
        """Return where the next record goes."""
        return Mark(self._segment, self._num_rows, self._next_segment)

    def rollback(self, mark: Mark) -> None:
        """Go back to `mark`, and give a full disk its space back."""
        self.close()
        with suppress(OSError):  # only space: the next append overwrites what stays
            for made in range(mark.next_segment, self._next_segment):
                disk.unlink(self._folder / segment_name(made))
            if mark.segment is not None:
                path = self._folder / segment_name(mark.segment)
                disk.truncate(path, self._layout.end(mark.num_rows))
        self._segment, self._num_rows, self._next_segment = mark

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
            file = self._open_active()
            stop = start + min(len(ids) - start, self._layout.max_rows - self._num_rows)
            file.put(self._num_rows, records.cut(start, stop))
            file.sync()
            part = digests[start * DIGEST_BYTES : stop * DIGEST_BYTES]
            packed = Records.pack(ids[start:stop], part, sums[start:stop])
            batches.append(RecordBatch(self._segment or 0, self._num_rows, packed))
            self._num_rows += stop - start
            start = stop
        return batches

    def segments_of(self, batches: Sequence[RecordBatch]) -> dict[int, Segment]:
        """Return the segments that `batches` were written to, as they are with them."""
        return {
            batch.segment: Segment(batch.stop_row, False, self._keys[batch.segment])
            for batch in batches
        }

    def start_anew(self) -> None:
        """Let the next record begin a new segment."""
        self.close()
        self._segment = None

    def take_number(self) -> int:
        """Return the number of a new segment, which somebody else will fill."""
        self._next_segment += 1
        return self._next_segment - 1

    def close(self) -> None:
        """Close the open segment file. Calling it twice is allowed."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open_active(self) -> SegmentFile:
        """Return the file of the active segment; start the next when it is full."""
        if self._segment is None or self._num_rows >= self._layout.max_rows:
            self.close()
            path = self._folder / segment_name(self._next_segment)
            self._file = SegmentFile.create(path, self._layout)
            self._segment, self._num_rows = self._next_segment, 0
            self._keys[self._segment] = self._file.key
            self._next_segment += 1
        elif self._file is None:
            path = self._folder / segment_name(self._segment)
            self._file = SegmentFile.open(path, self._layout, self._keys[self._segment])
        return self._file


def seal(folder: Path, layout: StoreLayout, catalog: Catalog, segment: int, info: Segment) -> None:
    """Write the footer of a full segment and tell the catalog that it will not change any more.

    Raises:
        OSError: the footer cannot be written. StoreError: the catalog, or it lacks records.
    """
    batches = catalog.batches(segment, info.num_rows)
    records = Records.join([batch.records for batch in batches])
    if len(records) != info.num_rows:
        raise StoreError(f"the catalog names {len(records)} of {info.num_rows} records")
    file = SegmentFile.open(folder / SEGMENTS / segment_name(segment), layout, info.key)
    try:
        file.seal(records)
    finally:
        file.close()
    parts = records.split(ROWS_A_BATCH)
    rebatched = [RecordBatch(segment, at * ROWS_A_BATCH, part) for at, part in enumerate(parts)]
    sealed = Segment(info.num_rows, True, info.key)
    catalog.commit(Change(segments={segment: sealed}, rebatched={segment: rebatched}))
