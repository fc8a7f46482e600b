"""Segments that other processes write, and how the store takes them in."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...arguments import Arguments, StrPath
from ...arrays import Array, Bool, Float16
from ...errors import StoreError, named
from . import disk
from .catalog import Change, Segment
from .format import (
    PAGE_BYTES,
    ROW_BITS,
    SEGMENTS,
    StoreLayout,
    header_fault,
    is_id,
    segment_name,
)
from .ids import RecordIndex
from .records import NewRecords, RecordBytes, Records, batches_of, digests_of, no_ids, repeated
from .segment import SegmentFile, read_footer
from .writer import StoreWriter

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
        tokens: Array,
        scales: Float16 | None = None,
        *,
        allow_nonfinite: bool = False,
    ) -> None:
        """Add records, as `TokenStore.append` does; on disk only when the segment is closed.

        Raises:
            RequestError: arguments of another kind (all of them).
            StoreError: the segment is closed or full; ids twice or no ids; wrong arrays; tokens
                that are not finite; no room.
        """
        if self._file is None:
            raise StoreError(f"the segment {self.path} is closed")
        new = NewRecords.take(ids, tokens, scales, allow_nonfinite)
        faults = [*new.faults(self._layout), *(no_ids(new.ids) or repeated(new.ids, self._ids))]
        room = self._layout.max_rows - len(self._ids)
        if len(new.ids) > room:
            count = len(new.ids)
            faults.append(f"{count} records, but a segment of this store has room for {room}")
        if faults:
            raise StoreError(f"cannot add to the segment {self.path}", faults=faults)
        if not new.ids:
            return
        digests, records = digests_of(new.ids), new.packed(self._layout)
        try:
            self._file.put(len(self._ids), records)
        except OSError as error:
            raise StoreError(f"cannot write to {self.path}: {error.strerror}") from error
        self._parts.append(Records.pack(new.ids, digests, records.checksums(digests)))
        self._ids.update(new.ids)

    def close(self) -> Path | None:
        """Seal the segment, make it durable, and give it its name.

        Returns:
            Its path, or None when it holds no records: then there is no file.

        Raises:
            StoreError: it cannot be written; then there is no file.
        """
        if self._file is None or not self._ids:
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

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.discard()


def incoming_name(task: str) -> str:
    """Return a file name for a task's segment that no other attempt of it takes."""
    return f"{task}-{secrets.token_hex(8)}{SUFFIX}"


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
        old = index.rows(records.ids())[0] >= 0
        present += int(np.count_nonzero(old))
        if not old.all():
            taken.append(_commit(writer, index, path, key, records, old))
            added += int(np.count_nonzero(~old))
        with suppress(OSError):  # it is in the store: whoever commits it again adds nothing
            disk.unlink(path)
    return CommitReport(added, present, tuple(taken))


def _commit(
    writer: StoreWriter, index: RecordIndex, path: Path, key: int, records: Records, old: Bool
) -> int:
    """Link one checked file into the store and commit it, without the records that are `old`."""
    with writer.writing("add a segment to"):
        segment = writer.appender.take_number()
        target = writer.folder / SEGMENTS / segment_name(segment)
        disk.unlink(target)
        _link(path, target)
        disk.sync_folder(target.parent)
    batches = batches_of(segment, records)
    locations = np.flatnonzero(old) + (segment << ROW_BITS)
    writer.commit(Change(batches, {segment: Segment(len(records), True, key)}, locations))
    index.add(batches, records.ids(), locations)
    return segment


def _link(source: Path, target: Path) -> None:
    """Give the file a name in the store; copy it where that cannot be (another file system)."""
    try:
        disk.link(source, target)
    except OSError:
        with disk.closed_after(disk.create(target)) as descriptor, source.open("rb") as file:
            offset = 0
            while content := file.read(1 << 24):
                disk.write(descriptor, [content], offset)
                offset += len(content)
            disk.sync(descriptor)


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
    return "an id comes twice in it" if len(set(ids)) < len(ids) else None


def _damaged_records(descriptor: int, layout: StoreLayout, records: Records) -> list[str]:
    """Return one sentence for every record that does not fit its checksum."""
    faults, ids, sums = [], records.ids(), records.checksum_array()
    for start in range(0, len(records), RECORDS_A_READ):
        stop = min(start + RECORDS_A_READ, len(records))
        found = RecordBytes.zeros(layout, stop - start)  # what the file lacks stays zero
        for at, row in enumerate(range(start, stop)):
            os.preadv(descriptor, [found.tokens[at].data], layout.offset(row))
            if found.scales is not None:
                os.preadv(descriptor, [found.scales[at].data], layout.scales_offset(row))
        wrong = found.checksums(records.digests[16 * start : 16 * stop]) != sums[start:stop]
        bad = (np.flatnonzero(wrong) + start).tolist()
        faults += [f"id {ids[row]!r}, row {row}: its bytes do not fit its checksum" for row in bad]
    return faults


def _refused(path: Path, faults: Sequence[str]) -> StoreError:
    return StoreError(
        f"{path} cannot be added to the store",
        faults=[*faults[:20], *([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])],
        hint="let its task write the segment again; the same store's layout makes it fit",
    )
