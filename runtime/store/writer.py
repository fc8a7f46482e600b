"""The one writer of a store: appends, replacements, deletions; segments sealed and committed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...arrays import Int64
from ...errors import StoreError, named
from ...files import LOCKS_HINT, lock_fault, open_lock, try_lock
from . import disk
from .batches import NewRecords
from .catalog import ROWS_A_BATCH, Catalog, CatalogState, Change, RecordBatch, Segment
from .format import LOCK, SEGMENTS, StoreLayout, id_fault, segment_name
from .ids import RecordIndex
from .pins import is_pinned_before
from .records import DIGEST_BYTES, Records, digests_of, repeated
from .segment import RecordBytes, SegmentFile


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


class StoreWriter:
    """The one writer of a store, as long as it lives: lock, catalog, active segment.

    After a commit of which nobody knows whether it reached the disk it closes itself: opening the
    store again reads the truth.
    """

    def __init__(self, folder: Path, layout: StoreLayout):
        """Become the writer of the store at `folder`; `close` ends it.

        Raises:
            StoreError: there is another writer, or the catalog cannot be used.
        """
        self.folder = folder
        self.layout = layout
        self._lock: int | None = lock_writer(folder)
        try:
            self.catalog = Catalog.open(folder, writable=True)
        except BaseException:
            self._unlock()
            raise
        self._appender: Appender | None = None
        self.keys: dict[int, int] = {}

    @property
    def is_open(self) -> bool:
        """Whether it can still write."""
        return self._appender is not None

    @property
    def appender(self) -> Appender:
        """Where new records go.

        Raises:
            StoreError: the writer has closed itself.
        """
        if self._appender is None:
            raise StoreError(
                f"the store {self.folder} is not open for writing",
                hint='open it (again) with TokenStore.open(path, mode="a")',
            )
        return self._appender

    def start(self, state: CatalogState) -> None:
        """Begin to write behind `state`; finish what a writer before could not."""
        if self._appender is not None:
            self._appender.close()
        self._appender = Appender(self.folder, self.layout, state)
        self.keys = {segment: info.key for segment, info in state.segments.items()}
        self.seal_full(state)
        self.collect(state)

    def append(self, index: RecordIndex, new: NewRecords) -> None:
        """Add records of new ids."""
        faults = new.faults(self.layout)
        self._check_ids("append to", new.ids, index, faults, present=False)
        self._add(index, new, replaced=np.empty(0, np.int64))

    def replace(self, index: RecordIndex, new: NewRecords) -> None:
        """Put new records in the place of those that their ids have."""
        faults = new.faults(self.layout)
        old = self._check_ids("replace in", new.ids, index, faults, present=True)
        self._add(index, new, replaced=old)

    def delete(self, index: RecordIndex, ids: Sequence[str]) -> None:
        """Take records away; their space stays until the store is compacted."""
        locations = self._check_ids("delete from", ids, index, [], present=True)
        if not len(locations):
            return
        self.commit(Change(deleted=locations))
        index.remove(ids, locations)

    def commit(self, change: Change) -> int:
        """Commit; when that fails, close the writer, since nobody knows what is on disk."""
        try:
            generation = self.catalog.commit(change)
        except BaseException:
            self.close()
            raise
        self.keys.update((segment, info.key) for segment, info in change.segments.items())
        return generation

    def seal_full(self, state: CatalogState | None = None) -> None:
        """Seal the full segments. What fails is tried again later: no record depends on it."""
        with suppress(OSError, StoreError):
            if state is None:
                with self.catalog.snapshot() as state:
                    pass
            for segment, info in state.segments.items():
                if info.num_rows >= self.layout.max_rows and not info.sealed:
                    seal(self.folder, self.layout, self.catalog, segment, info)

    def collect(self, state: CatalogState | None = None) -> None:
        """Remove files that no generation in use needs.

        What fails is tried again later: only space depends on it.
        """
        with suppress(OSError, StoreError):
            if state is None:
                with self.catalog.snapshot() as state:
                    pass
            for path in sorted((self.folder / SEGMENTS).glob("*.tokens")):
                segment = int(path.stem) if path.stem.isdigit() else None
                if segment is None or segment in state.segments:
                    continue
                # Neither in use nor retired: left by a change that was never acknowledged.
                if not is_pinned_before(self.folder, state.retired.get(segment, 0)):
                    disk.unlink(path)
            names = {segment: segment_name(segment) for segment in state.retired}
            done = [s for s, name in names.items() if not (self.folder / SEGMENTS / name).exists()]
            if done:
                disk.sync_folder(self.folder / SEGMENTS)
                self.catalog.forget_retired(done)

    def close(self) -> None:
        """Release everything. Calling it twice is allowed."""
        if self._appender is not None:
            self._appender.close()
        self._appender = None
        self.catalog.close()
        self._unlock()

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Undo what the block wrote if it fails, and say that nothing has changed."""
        appender = self.appender
        mark = appender.mark()
        try:
            yield
        except OSError as error:
            appender.rollback(mark)
            reason = error.strerror or error
            raise StoreError(
                f"cannot {what} the store {self.folder}, nothing has changed: {reason}",
                hint="make room on the disk, or look after it, and try again",
            ) from error
        except BaseException:
            appender.rollback(mark)
            raise

    def _add(self, index: RecordIndex, new: NewRecords, *, replaced: Int64) -> None:
        ids = new.ids
        if not ids:
            return
        appender, digests, records = self.appender, digests_of(ids), new.packed(self.layout)
        with self.writing("write to"):
            batches = appender.write(ids, digests, records)
        segments = appender.segments_of(batches)
        self.commit(Change(batches, segments, replaced))
        index.add(batches, ids, replaced)
        if any(info.num_rows >= self.layout.max_rows for info in segments.values()):
            self.seal_full()

    def _check_ids(
        self,
        verb: str,
        ids: Sequence[str],
        index: RecordIndex,
        faults: list[str],
        *,
        present: bool,
    ) -> Int64:
        """Return the rows of `ids`, which must all be there, or must all be new (`present`).

        Raises:
            StoreError: what is wrong with them, after the `faults` of what belongs to them.
        """
        wrong = [f"{image_id!r:.80} {why}" for image_id in ids if (why := id_fault(image_id))]
        faults += [f"{len(wrong)} are no ids: {'; '.join(wrong[:20])}"] if wrong else []
        rows = np.empty(0, np.int64)
        if not wrong:
            rows, unknown = index.rows(ids)
            twice = repeated(ids)
            faults += [f"{len(twice)} ids come twice: {named(twice)}"] if twice else []
            known = [ids[at] for at in np.flatnonzero(rows >= 0).tolist()]
            if present and unknown:
                faults.append(f"{len(unknown)} ids are not in the store: {named(unknown)}")
            elif not present and known:
                faults.append(f"{len(known)} ids are in the store already: {named(known)}")
        if faults:
            what = f"cannot {verb} the store {self.folder}, nothing has changed"
            raise StoreError(what, faults=faults)
        return rows

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
