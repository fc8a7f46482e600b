"""Changes to a store: bytes on disk first, then the commit that makes them records, then memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ...errors import StoreError, named
from . import disk
from .arrays import NewRecords
from .catalog import Catalog, CatalogState, Change
from .index import RecordIndex
from .layout import SEGMENTS, Int64, StoreLayout, id_fault, segment_name
from .pins import is_pinned_before
from .records import digests_of, repeated
from .writer import Appender, lock_writer, seal


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

    def collect(self, state: CatalogState | None = None) -> int:
        """Remove files that no generation in use needs; return how many bytes that gave back.

        What fails is tried again later: only space depends on it.
        """
        freed = 0
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
                    size = path.stat().st_blocks * 512
                    disk.unlink(path)
                    freed += size
            names = {segment: segment_name(segment) for segment in state.retired}
            done = [s for s, name in names.items() if not (self.folder / SEGMENTS / name).exists()]
            if done:
                disk.sync_folder(self.folder / SEGMENTS)
                self.catalog.forget_retired(done)
        return freed

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
