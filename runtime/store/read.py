"""Reading records: rows -> the caller's buffer by plain `preadv`, every record verified.

A chunk of records is read, then hashed while its bytes are in the core's cache: by the calling
thread, and where it pays by a few beside it.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from mmap import mmap
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import xxhash

from ...arrays import Int64, UInt8, UInt64
from ...errors import StoreError
from .format import (
    PAGE_BYTES,
    ROW_BITS,
    ROW_MASK,
    SEGMENTS,
    StoreLayout,
    header_fault,
    segment_name,
)
from .threads import CopyThreads, copying_threads

Access = Literal["cached", "direct"]

# Stays in a core's second-level cache until it is hashed.
CHUNK_BYTES = 1 << 20
# A thread's turn at hashing holds the GIL, and waking a thread takes as long as reading a few
# records: below this a second one is no help.
BYTES_A_THREAD, MOST_READING = 8 << 20, 4
# Past the page cache threads wait for the disk, not for each other: it should have much to do.
DIRECT_CHUNK_BYTES, DIRECT_BYTES_A_THREAD, MOST_DIRECT = 256 << 10, 128 << 10, 16
# Records that are looked for in the page cache before the system is asked to fetch a batch. Once
# so many batches in a row were there, one record of every fourth is enough: looking takes time.
NUM_PROBES, CALM_BATCHES, LOOKED_AFTER = 8, 16, 4

CACHED = 'open the store with access="cached"'
MASK = np.array(ROW_MASK)
MISFIT = "its bytes do not fit its checksum"


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that could not be read whole. `position` is its place in the requested rows."""

    position: int
    id: str
    segment: int
    row: int
    reason: str

    def __str__(self) -> str:
        return f"id {self.id!r} (segment {self.segment}, row {self.row}): {self.reason}"


class ReadPlan(NamedTuple):
    """What to read, sorted by location, each [N]: where to, from where, and what it must hash to.

    `positions` int64: rows of the caller's buffer; `locations` int64; `seeds`, `checksums` uint64.
    """

    positions: Int64
    locations: Int64
    seeds: UInt64
    checksums: UInt64


class SegmentReader:
    """Reads records of one store; safe to use from several threads, and in a forked child.

    Args:
        folder: the store's.
        layout: the store's.
        key_of: returns the key that a segment's header page must hold, None for no segment.
        access: `"cached"` reads through the system's page cache; `"direct"` past it (O_DIRECT),
            for a store much larger than memory.

    Raises:
        StoreError: this system has no O_DIRECT.
    """

    def __init__(
        self,
        folder: Path,
        layout: StoreLayout,
        *,
        key_of: Callable[[int], int | None],
        access: Access = "cached",
    ):
        self._layout = layout
        self._record_bytes, self._stride = layout.record_bytes, layout.stride
        self._scale_bytes, self._group = layout.scale_bytes, layout.group_records
        # Arrays of no dimension: NumPy takes them in half the time of an int.
        first, strides = layout.offset(0), self._group * self._stride
        self._first, self._strides = np.array(first), np.array(self._stride)
        self._gap = layout.offset(self._group) - first - strides
        self._direct, open_files = access == "direct", (folder, layout, key_of)
        self._files = self._cached = _SegmentFiles(*open_files)
        if self._direct:
            self._files = _SegmentFiles(*open_files, direct=True)
            self._threads = CopyThreads(MOST_DIRECT, DIRECT_BYTES_A_THREAD)
        else:
            self._threads = CopyThreads(min(MOST_READING, copying_threads()), BYTES_A_THREAD)
        size = DIRECT_CHUNK_BYTES if self._direct else CHUNK_BYTES
        # A chunk's files are all in use at once, however many segments it touches.
        self._chunk = max(1, min(size // self._stride, self._files.most_open // 8))
        self._own = threading.local()  # `memory`: aligned, for what is read past the page cache
        self._num_cached = 0  # batches in a row that prefetching found in the page cache

    def gather(
        self,
        plan: ReadPlan,
        tokens: memoryview,
        scales: memoryview | None = None,
        *,
        verify: bool = True,
    ) -> dict[int, str]:
        """Read every record of `plan` into the caller's buffers.

        Args:
            plan: which records, and where to.
            tokens: bytes [N * record_bytes], writable; with `"direct"` best at a page's start.
            scales: bytes [N * scale_bytes] (int8), or None when they are not wanted.
            verify: compare each record with its checksum.

        Returns:
            The reason of each bad record by its place in the plan, in no certain order. Its bytes
            and scales are zero, so that nothing damaged leaves this function.

        Raises:
            StoreError: too many open files, no O_DIRECT there, or the reader is closed.
        """
        bad: dict[int, str] = {}
        num_records = len(plan.locations)
        if not self._scale_bytes:
            scales = None
        elif scales is None:  # without them nothing can be verified
            room = len(tokens) // self._record_bytes * self._scale_bytes
            scales = memoryview(bytearray(room))

        def read(part: slice) -> None:
            self._read(plan, part, tokens, scales, verify, bad)

        if num_records * self._stride < 2 * self._threads.bytes_a_thread:
            for start in range(0, num_records, self._chunk):
                read(slice(start, start + self._chunk))
        else:
            self._threads.share(num_records, num_records * self._stride, read, self._chunk)
        return bad

    def _read(
        self,
        plan: ReadPlan,
        part: slice,
        tokens: memoryview,
        scales: memoryview | None,
        verify: bool,
        bad: dict[int, str],
    ) -> None:
        """Read and verify one chunk; note what is bad, and leave zeros in its place."""
        positions = plan.positions[part]
        views = [_views(tokens, positions, self._record_bytes)]
        if scales is not None:
            views.append(_views(scales, positions, self._scale_bytes))
        reasons = self._fill(plan.locations[part], views)
        if verify:
            seeds: list[int] = plan.seeds[part].tolist()
            for each in reversed(views):  # the hash of its scales is the seed of an int8 record
                seeds = list(map(xxhash.xxh3_64_intdigest, each, seeds))
            wanted = plan.checksums[part].tolist()
            if seeds != wanted:
                misfits = [at for at in range(len(seeds)) if seeds[at] != wanted[at]]
                reasons = dict.fromkeys(misfits, MISFIT) | reasons
        for at, reason in reasons.items():
            bad[part.start + at] = reason
            for each in views:
                each[at][:] = bytes(len(each[at]))

    def _fill(self, locations: Int64, views: list[list[memoryview]]) -> dict[int, str]:
        """Read the tokens (and scales) at `locations` into `views`; return why some cannot be."""
        first, last, count = int(locations[0]), int(locations[-1]), len(locations)
        segments = [first >> ROW_BITS] * count
        if first >> ROW_BITS != last >> ROW_BITS:
            segments = (locations >> ROW_BITS).tolist()
        is_dense = last - first < 2 * count and self._stride == self._record_bytes
        starts = self._run_starts(locations) if is_dense else None
        rows: Int64 = locations & MASK
        files, offsets = self._files.of(segments), [self._offsets(rows)]
        read = self._read_direct if self._direct else _read_runs
        is_whole = read(files, views[0], offsets[0], starts)
        if len(views) > 1:
            offsets.append(self._layout.scales_offset(rows))
            files = self._cached.of(segments) if self._direct else files
            is_whole = is_whole and _read_runs(files, views[1], offsets[1], starts)
        if is_whole:
            return {}
        reasons: dict[int, str] = {}
        for at, segment in enumerate(segments):  # what goes wrong is read again one by one
            file = self._cached.open(segment)
            for each, offset in zip(views, offsets, strict=True):
                reason = file if isinstance(file, str) else _read_whole(file, each[at], offset[at])
                if reason is not None:
                    reasons.setdefault(at, reason)
        return reasons

    def _read_direct(
        self, files: list[int], views: list[memoryview], offsets: Int64, starts: Int64 | None
    ) -> bool:
        """As `_read_runs`, through aligned memory where the caller's is not: O_DIRECT wants it."""
        stride = self._stride
        if (
            stride == self._record_bytes
            and address(np.frombuffer(views[0], np.uint8)) % PAGE_BYTES == 0
        ):
            return _read_runs(files, views, offsets, starts)
        room: memoryview = getattr(self._own, "room", memoryview(b""))
        if len(room) < len(views) * stride:
            room = self._own.room = memoryview(mmap(-1, self._chunk * stride))
        pages = _views(room, np.arange(len(views)), stride)
        is_whole = _read_runs(files, pages, offsets, starts)
        for view, page in zip(views, pages, strict=True):
            view[:] = page[: len(view)]
        return is_whole

    def _offsets(self, rows: Int64) -> Int64:
        """As `StoreLayout.offset`, which works everything out anew."""
        offsets: Int64 = rows * self._strides + self._first
        return offsets + rows // self._group * self._gap if self._group else offsets

    def _run_starts(self, locations: Int64) -> Int64:
        """Return where records begin that do not lie behind the one before in the file."""
        follows = locations[1:] - locations[:-1] == 1
        if self._group:  # its scales lie between two groups
            follows &= (locations[1:] & ROW_MASK) % self._group != 0
        return np.flatnonzero(np.append(True, ~follows))

    def prefetch(self, locations: Int64) -> None:
        """Ask the system to read records into its page cache in the background; a hint.

        `locations`: int64 [N], in any order. Does nothing with `"direct"`.
        """
        if self._direct or not len(locations) or not hasattr(os, "posix_fadvise"):
            return
        is_calm = self._num_cached >= CALM_BATCHES
        self._num_cached += 1
        if is_calm and self._num_cached % LOOKED_AFTER:
            return
        num_probes = 1 if is_calm else NUM_PROBES
        if self._are_cached(locations[:: -(-len(locations) // num_probes)]):
            return
        self._num_cached, ordered = 0, np.sort(locations)
        for start in range(0, len(ordered), self._chunk):
            self._advise(ordered[start : start + self._chunk])

    def _are_cached(self, locations: Int64) -> bool:
        """Whether these few records are in the page cache."""
        files = self._files.of((locations >> ROW_BITS).tolist())
        offsets = self._offsets(locations & ROW_MASK).tolist()
        try:
            for file, offset in zip(files, offsets, strict=True):
                if file >= 0:
                    os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT)
        except (OSError, AttributeError):  # it would wait for the disk, or nobody can tell
            return False
        return True

    def _advise(self, locations: Int64) -> None:
        """Advise to read runs of records, and their scales."""
        starts = self._run_starts(locations)
        counts, rows = np.diff(starts, append=len(locations)), locations[starts] & ROW_MASK
        files = self._files.of((locations[starts] >> ROW_BITS).tolist())
        _will_need(files, self._offsets(rows), counts * self._stride)
        if self._scale_bytes:
            _will_need(files, self._layout.scales_offset(rows), counts * self._scale_bytes)

    def retire(self) -> None:
        """Keep no file open any more, but for the reads of those who still have this reader."""
        for files in (self._files, self._cached):
            files.keep(0)
        self._threads.close()

    def close(self) -> None:
        """Close all files; those in use when their read is through. Can be called twice."""
        for files in (self._files, self._cached):
            files.close()
        self._threads.close()


class _Descriptor(int):
    """An open file's descriptor, closed when nobody holds it any more."""

    def __del__(self) -> None:
        os.close(self)


class _SegmentFiles:
    """Descriptors of segment files, checked as they open; safe to use from several threads.

    It takes no lock, so that a forked child may go on with it: a step on `_open` cannot be torn.

    Attributes:
        most_open: no more stay open, but for those in use: half of what the process may, or a
            quarter of it past the page cache.
    """

    def __init__(
        self,
        folder: Path,
        layout: StoreLayout,
        key_of: Callable[[int], int | None],
        *,
        direct: bool = False,
    ):
        self._folder, self._layout, self._key_of = folder / SEGMENTS, layout, key_of
        self._flags = os.O_RDONLY | os.O_CLOEXEC | (_direct_flag(folder) if direct else 0)
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()  # the oldest first
        self._is_closed = False
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        unlimited = limit == resource.RLIM_INFINITY
        self.most_open = 4096 if unlimited else max(1, limit // (4 if direct else 2))

    def of(self, segments: Sequence[int]) -> list[int]:
        """Return a descriptor for each of `segments`, -1 where none can be used.

        They stay open as long as the caller holds them.

        Raises:
            StoreError: too many open files, no O_DIRECT there, or closed.
        """
        try:
            return list(map(self._open.__getitem__, segments))  # as nearly always
        except KeyError:
            pass
        once = dict.fromkeys(segments)
        files = dict(zip(once, map(self.open, once), strict=True))
        return [-1 if isinstance(file := files[each], str) else file for each in segments]

    def open(self, segment: int) -> _Descriptor | str:
        """Return the file of a segment, or why it cannot be used.

        Raises:
            StoreError: as `of`.
        """
        if self._is_closed:
            raise StoreError(f"the store {self._folder.parent} is closed")
        file = self._open.get(segment)
        if file is not None:
            return file
        opened = self._open_checked(segment)
        if isinstance(opened, str):
            return opened
        file = self._open.setdefault(segment, opened)  # another thread's, if it was faster
        self.keep(self.most_open)
        return file

    def keep(self, most: int) -> None:
        """Keep at most so many files open from now on, besides those in use."""
        self.most_open = 0 if self._is_closed else most
        with suppress(KeyError):  # another thread was faster
            while len(self._open) > self.most_open:
                self._open.popitem(last=False)

    def close(self) -> None:
        """Close all files; those in use when nobody holds them any more."""
        self._is_closed = True
        self.keep(0)

    def _open_checked(self, segment: int) -> _Descriptor | str:
        """Open a segment file and check its header page."""
        name = segment_name(segment)
        key = self._key_of(segment)
        if key is None:
            return f"the catalog knows no segment {segment}"
        try:
            file = self._open_file(self._folder / name)
        except OSError as error:
            return f"its file {name} cannot be opened ({error.strerror})"
        page = mmap(-1, PAGE_BYTES)  # aligned, as O_DIRECT wants it
        try:
            size = os.preadv(file, [page], 0)
        except OSError as error:
            return (
                f"its file {name} cannot be used: its header page cannot be read ({error.strerror})"
            )
        fault = header_fault(page[:size], self._layout, key)
        return file if fault is None else f"its file {name} cannot be used: {fault}"

    def _open_file(self, path: Path) -> _Descriptor:
        try:
            return _Descriptor(os.open(path, self._flags))
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise StoreError(
                    f"cannot open {path} with O_DIRECT: its file system has none",
                    hint=CACHED,
                ) from error
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self._open.clear()  # files of ours that nobody uses may be in the way
        try:
            return _Descriptor(os.open(path, self._flags))
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            raise StoreError(
                f"cannot open {path}: {error.strerror}",
                hint="raise the limit of open files (`ulimit -n`)",
            ) from error


def address(array: UInt8) -> int:
    """Return where an array begins in memory."""
    return int(array.__array_interface__["data"][0])


def _views(buffer: memoryview, positions: Int64, size: int) -> list[memoryview]:
    """Return the rows of `size` bytes at `positions`."""
    return [buffer[at : at + size] for at in (positions * size).tolist()]


def _read_runs(
    files: list[int], views: list[memoryview], offsets: Int64, starts: Int64 | None
) -> bool:
    """Fill all `views`, one read from each of `starts` to the next; whether all came whole."""
    buffers: Iterable[Sequence[memoryview]]
    if starts is None:
        places, buffers, wanted = offsets.tolist(), zip(views), [len(views[0])] * len(views)
    else:
        edges = [*starts.tolist(), len(views)]
        runs = [slice(start, stop) for start, stop in pairwise(edges)]
        places, files = offsets[starts].tolist(), [files[run.start] for run in runs]
        buffers = [views[run] for run in runs]
        wanted = [sum(map(len, buffer)) for buffer in buffers]
    try:
        return list(map(os.preadv, files, buffers, places)) == wanted
    except OSError:
        return False


def _read_whole(file: int, buffer: memoryview, offset: int) -> str | None:
    """Fill `buffer` from `offset` on; return None, or why it could not be filled."""
    done = 0
    while done < len(buffer):
        try:
            size = os.preadv(file, [buffer[done:]], offset + done)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if not size:
            return f"its segment file ends {len(buffer) - done} bytes early"
        done += size
    return None


def _will_need(files: list[int], offsets: Int64, num_bytes: Int64) -> None:
    spans = zip(files, offsets.tolist(), num_bytes.tolist(), strict=True)
    with suppress(OSError):
        for file, offset, size in spans:
            if file >= 0:  # a file that cannot be opened is named when it is read
                os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)


def _direct_flag(folder: Path) -> int:
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        raise StoreError(
            f"cannot read the store {folder} past the page cache: this system has no O_DIRECT",
            hint=CACHED,
        )
    return int(flag)
