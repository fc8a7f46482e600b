"""Segments made elsewhere: a task writes one, the store's writer commits it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from ...arguments import Arguments, StrPath
from ...errors import StoreError, named
from . import disk
from .arrays import NewRecords
from .layout import StoreLayout, id_fault
from .records import Records, digests_of, repeated
from .segment_file import RecordBytes, SegmentFile

SUFFIX = ".tokens"


class SegmentWriter:
    """Writes one immutable segment file that explains itself, for a store of the same layout.

    Any number of processes and machines write segments at once; whoever writes the store commits
    them with `TokenStore.commit_segments`. Leaving the `with` block by an exception, or being
    killed, leaves nothing that could be committed.
    """

    def __init__(self, path: StrPath, layout: StoreLayout):
        """Begin a segment that will appear at `path` when it is closed.

        Args:
            path: ends in `.tokens`; best in the store's folder `incoming/`, on its file system.
            layout: of the store (`StoreLayout.read`).

        Raises:
            RequestError: arguments of another kind (all of them).
            StoreError: the file cannot be made.
        """
        given = Arguments("SegmentWriter")
        self.path = given.path("path", path)
        if not isinstance(layout, StoreLayout):
            given.refuse("layout", layout, "a StoreLayout: StoreLayout.read(store)")
        given.check()
        self._layout = layout
        self._parts: list[Records] = []
        self._num_rows = 0
        self._ids: set[str] = set()
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.partial")
        self._file: SegmentFile | None = None
        if self.path.suffix != SUFFIX:
            raise StoreError(f"cannot write a segment at {path}: its name must end in {SUFFIX}")
        try:
            self._file = SegmentFile.create(self._temporary, layout)
        except OSError as error:
            raise StoreError(f"cannot write a segment at {path}: {error.strerror}") from error

    def append(
        self,
        ids: Iterable[str],
        tokens: npt.NDArray[np.generic],
        scales: npt.NDArray[np.float16] | None = None,
        *,
        allow_nonfinite: bool = False,
    ) -> None:
        """Add records, as `TokenStore.append` does; on disk only when the segment is closed.

        Raises:
            RequestError: arguments of another kind (all of them).
            StoreError: the segment is closed or full; ids twice or no ids; wrong arrays; tokens
                that are not finite; no room.
        """
        file = self._file
        if file is None:
            raise StoreError(f"the segment {self.path} is closed")
        new = NewRecords.take(ids, tokens, scales, allow_nonfinite)
        self._check(new)
        if new.ids:
            self._put(file, new.ids, new.packed(self._layout))

    def close(self) -> Path | None:
        """Seal the segment, make it durable, and give it its name.

        Returns:
            Its path, or None when it holds no records: then there is no file.

        Raises:
            StoreError: it cannot be written; then there is no file.
        """
        if self._file is None or not self._num_rows:
            self.discard()
            return None
        try:
            self._file.seal(Records.join(self._parts))
            self._file.close()
            disk.rename(self._temporary, self.path)
            disk.sync_folder(self.path.parent)
        except OSError as error:
            self.discard()
            raise StoreError(f"cannot write {self.path}: {error.strerror}") from error
        self._file = None
        return self.path

    def discard(self) -> None:
        """Remove what was written. Calling it twice, or after `close`, is allowed."""
        if self._file is not None:
            self._file.close()
            self._file = None
            disk.unlink(self._temporary)

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    def _put(self, file: SegmentFile, ids: Sequence[str], records: RecordBytes) -> None:
        """Write records behind the others."""
        digests = digests_of(ids)
        try:
            file.put(self._num_rows, records)
        except OSError as error:
            raise StoreError(f"cannot write to {self.path}: {error.strerror}") from error
        self._parts.append(Records.pack(ids, digests, records.checksums(digests)))
        self._num_rows += len(ids)
        self._ids.update(ids)

    def _check(self, new: NewRecords) -> None:
        ids, faults = new.ids, new.faults(self._layout)
        wrong = [f"{image_id!r:.80} {why}" for image_id in ids if (why := id_fault(image_id))]
        if wrong:
            faults.append(f"{len(wrong)} are no ids: {'; '.join(wrong[:20])}")
        elif twice := repeated([*self._ids.intersection(ids), *ids]):
            faults.append(f"{len(twice)} ids come twice: {named(twice)}")
        room = self._layout.max_rows - self._num_rows
        if len(ids) > room:
            faults.append(f"{len(ids)} records, but a segment of this store has room for {room}")
        if faults:
            raise StoreError(f"cannot add to the segment {self.path}", faults=faults)


def incoming_name(task: str) -> str:
    """Return a file name for a task's segment that no other attempt of it takes."""
    return f"{task}-{secrets.token_hex(8)}{SUFFIX}"
