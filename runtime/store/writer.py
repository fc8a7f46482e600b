"""The one writer of a store: appends, replacements, deletions, segments sealed; compaction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...arguments import Progress
from ...arrays import Int64
from ...errors import RequestError, StoreError, counted, named
from ...files import Closing
from . import disk
from .catalog import Catalog, CatalogState, Change, Segment
from .format import SEGMENTS, StoreLayout, segment_name
from .ids import RecordIndex
from .memory import Reader
from .records import NewRecords, RecordBatch, RecordBytes, digests_of, no_ids, repeated
from .segment import Appender, seal


class StoreWriter(Closing):
    """The one writer of a store, as long as it lives: lock, catalog, active segment.

    After a commit of which nobody knows whether it reached the disk it closes itself: opening the
    store again reads the truth.

    Attributes:
        appender: where new records go, once it was started.
        is_open: whether it can still write.
    """

    appender: Appender

    def __init__(self, folder: Path, layout: StoreLayout):
        """Become the writer of the store at `folder`; `close` ends it.

        Raises:
            StoreError: there is another writer, or the catalog cannot be used.
        """
        self.folder, self.layout = folder, layout
        self._lock = disk.lock_writer(folder)
        try:
            self.catalog = Catalog.open(folder, writable=True)
        except BaseException:
            self._lock.close()
            raise
        self.is_open = False

    def start(self, state: CatalogState) -> None:
        """Begin to write behind `state`; finish what a writer before could not."""
        if self.is_open:
            self.appender.close()
        self.appender, self.is_open = Appender(self.folder, self.layout, state), True
        self.seal_full(state)
        self._collect(state)

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

    def commit(self, change: Change) -> None:
        """Commit; when that fails, close the writer, since nobody knows what is on disk."""
        try:
            self.catalog.commit(change)
        except BaseException:
            self.close()
            raise
        self.appender.keys.update((segment, info.key) for segment, info in change.segments.items())

    def seal_full(self, state: CatalogState | None = None) -> None:
        """Seal the full segments. What fails is tried again later: no record depends on it."""
        with suppress(OSError, StoreError):
            for segment, info in (state or self.catalog.state()).segments.items():
                if info.num_rows >= self.layout.max_rows and not info.sealed:
                    seal(self.folder, self.layout, self.catalog, segment, info)

    def _collect(self, state: CatalogState) -> None:
        """Remove files that no generation in use needs; what fails is tried again later."""
        folder = self.folder / SEGMENTS
        with suppress(OSError, StoreError):
            for path in sorted(folder.glob("*.tokens")):
                segment = int(path.stem) if path.stem.isdigit() else None
                if segment is None or segment in state.segments:
                    continue
                # Neither in use nor retired: left by a change that was never acknowledged.
                if not disk.is_read_before(self.folder, state.retired.get(segment, 0)):
                    disk.unlink(path)
            done = [each for each in state.retired if not (folder / segment_name(each)).exists()]
            if done:
                disk.sync_folder(folder)
                self.catalog.forget_retired(done)

    def close(self) -> None:
        """Release everything. Calling it twice is allowed."""
        if self.is_open:
            self.appender.close()
        self.is_open = False
        self.catalog.close()
        self._lock.close()

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Undo what the block wrote if it fails, and say that nothing has changed."""
        appender = self.appender
        mark = appender.mark
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
        """Return the rows of `ids`, which must all be `present`, or all be new; name all faults."""
        wrong, rows = no_ids(ids), np.empty(0, np.int64)
        faults += wrong
        if not wrong:
            faults += repeated(ids)
            rows, unknown = index.rows(ids)
            known = [ids[at] for at in np.flatnonzero(rows >= 0).tolist()]
            if present and unknown:
                absent = counted(len(unknown), "id is", "ids are")
                faults.append(f"{absent} not in the store: {named(unknown)}")
            elif not present and known:
                there = counted(len(known), "id is", "ids are")
                faults.append(f"{there} in the store already: {named(known)}")
        if faults:
            what = f"cannot {verb} the store {self.folder}, nothing has changed"
            raise StoreError(what, faults=faults)
        return rows


RECORDS_A_READ = 512


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What `compact` did.

    Attributes:
        num_moved: records that were written again.
        num_dropped: segments that the store does without now.
        freed_bytes: how much less the store's folder takes on disk than before, as `du` counts
            it; negative where files that open readers need stay beside their successors.
        waiting_bytes: of these files: they go when the store is opened for changes, or compacted,
            after the readers have closed.
        left: segments that stay because they hold damaged records, with the reason.
    """

    num_moved: int
    num_dropped: int
    freed_bytes: int
    waiting_bytes: int
    left: tuple[str, ...]


def move_records(
    writer: StoreWriter,
    index: RecordIndex,
    reader: Reader,
    max_dead_share: float,
    progress: Progress | None = None,
) -> tuple[int, int, list[str]]:
    """Move the live records out of segments with too many deleted ones, one commit a segment.

    Segments less than half full are joined as well. `index` is out of date afterwards.

    Returns:
        How many records were moved, how many segments dropped, and why others stay.

    Raises:
        RequestError: `max_dead_share` is no share.
        StoreError: no room on the disk; what was committed before stays.
    """
    if not 0 <= max_dead_share < 1:
        raise RequestError(f"max_dead_share is {max_dead_share}, expected 0 or more, less than 1")
    victims = _victims(writer, index, max_dead_share)
    if writer.appender.mark.segment in victims:
        writer.appender.start_anew()
    moved, left = 0, []
    for number, segment in enumerate(victims):
        rows = index.live_rows(segment)
        damaged = _move(writer, index, reader, segment, rows)
        if damaged:
            left.append(f"segment {segment} stays: {damaged}")
        else:
            moved += len(rows)
        if progress:
            progress(number + 1, len(victims))
    writer.seal_full()
    return moved, len(victims) - len(left), left


def _victims(writer: StoreWriter, index: RecordIndex, max_dead_share: float) -> list[int]:
    """Return the segments with too many deleted records, and the small ones if there are two."""
    num_rows = {each: info.num_rows for each, info in writer.catalog.state().segments.items()}
    live = {segment: len(index.live_rows(segment)) for segment in num_rows}
    dead = [each for each, n in num_rows.items() if n - live[each] > max_dead_share * n]
    small = [each for each, count in live.items() if 2 * count < writer.layout.max_rows]
    return sorted({*dead, *(small if len(small) > 1 else [])})


def _move(
    writer: StoreWriter, index: RecordIndex, reader: Reader, segment: int, rows: Int64
) -> str | None:
    """Write the live records of a segment anew and drop it; return why it cannot go."""
    ids = index.ids_of(rows)
    batches: list[RecordBatch] = []
    segments: dict[int, Segment] = {}
    with writer.writing("compact"):
        mark = writer.appender.mark
        for start in range(0, len(rows), RECORDS_A_READ):
            plan = index.plan(rows[start : start + RECORDS_A_READ])
            records = RecordBytes.zeros(writer.layout, len(plan.locations))
            scales = None if records.scales is None else records.scales.reshape(-1).data
            for place, reason in reader.gather(
                plan, records.tokens.reshape(-1).data, scales
            ).items():
                writer.appender.rollback(mark)
                return str(index.bad_record(plan, place, reason))
            names = ids[start : start + RECORDS_A_READ]
            batches += writer.appender.write(names, digests_of(names), records)
            segments |= writer.appender.segments_of(batches)
    writer.commit(Change(batches, segments, dropped=[segment]))
    return None
