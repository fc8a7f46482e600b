"""Reading records: rows -> the caller's buffer by plain `preadv`, every record verified.

A record is hashed while its bytes are in the core's cache: by the calling thread, and where it pays
by others beside it. Where the C extension was built (`unlocked.py`), nobody needs the GIL for it.
Elsewhere chunks are read, then hashed with the GIL, which whoever reads wants after every record:
a second thread is of little help then.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from ...arrays import CopyThreads, Int64, copying_threads
from .format import PAGE_BYTES, ROW_BITS, ROW_MASK, StoreLayout
from .open_files import SegmentFiles
from .records import ReadPlan
from .unlocked import LEAST_BYTES, is_built, read_and_hash

# Stays in a core's second-level cache until it is hashed.
CHUNK_BYTES = 1536 << 10
# One thread more for every so many, where none needs the GIL.
BYTES_UNLOCKED = 1 << 20
# The same where all of them do.
BYTES_A_THREAD, MOST_READING = 8 << 20, 4
# Past the page cache threads wait for the disk, not for each other: it should have much to do.
DIRECT_CHUNK_BYTES, DIRECT_BYTES_A_THREAD, MOST_DIRECT = 256 << 10, 128 << 10, 16
# Records that are looked for in the page cache before the system is asked to fetch a batch. Once
# so many batches in a row were there, one record of every fourth is enough: looking takes time.
NUM_PROBES, CALM_BATCHES, LOOKED_AFTER = 8, 16, 4

MASK = np.array(ROW_MASK)
MISFIT = "its bytes do not fit its checksum"


class SegmentReader:
    """Reads records of one store; safe to use from several threads, and in a forked child."""

    def __init__(
        self,
        folder: Path,
        layout: StoreLayout,
        *,
        key_of: Callable[[int], int | None],
        access: Literal["cached", "direct"] = "cached",
    ):
        """Open no file yet.

        Args:
            key_of: returns the key that a segment's header page must hold, None for no segment.
            access: `"cached"` reads through the system's page cache; `"direct"` past it (O_DIRECT),
                for a store much larger than memory.

        Raises:
            StoreError: this system has no O_DIRECT.
        """
        self._layout = layout
        self._record_bytes, self._stride = layout.record_bytes, layout.stride
        self._scale_bytes, self._group = layout.scale_bytes, layout.group_records
        # Arrays of no dimension: NumPy takes them in half the time of an int.
        first, strides = layout.offset(0), self._group * self._stride
        self._first, self._strides = np.array(first), np.array(self._stride)
        self._gap = layout.offset(self._group) - first - strides
        self._direct, open_files = access == "direct", (folder, layout, key_of)
        self._files = self._cached = SegmentFiles(*open_files)
        self._is_unlocked = not self._direct and self._record_bytes >= LEAST_BYTES and is_built()
        if self._direct:
            self._files = SegmentFiles(*open_files, direct=True)
            self._threads = CopyThreads(MOST_DIRECT, DIRECT_BYTES_A_THREAD)
        elif self._is_unlocked:
            self._threads = CopyThreads(copying_threads(), BYTES_UNLOCKED)
        else:
            self._threads = CopyThreads(min(MOST_READING, copying_threads()), BYTES_A_THREAD)
        size = DIRECT_CHUNK_BYTES if self._direct else CHUNK_BYTES
        if self._is_unlocked:
            size = sys.maxsize  # each record is hashed while it is there
        # A chunk's files are all in use at once, however many segments it touches.
        self._chunk = max(1, min(size // self._stride, self._files.most_open // 8))
        self._own = threading.local()  # `room`: aligned, for what is read past the page cache
        self._num_cached = 0  # batches in a row that prefetching found in the page cache

    def gather(
        self,
        plan: ReadPlan,
        tokens: memoryview,
        scales: memoryview | None,
        *,
        verify: bool = True,
    ) -> dict[int, str]:
        """Read every record of `plan` into the caller's buffers.

        Args:
            tokens: bytes [N * record_bytes], writable; with `"direct"` best at a page's start.
            scales: bytes [N * scale_bytes]; None for float16.

        Returns:
            Why each bad record is bad, by its place in the plan, in no certain order. Its bytes
            and scales are zero, so that nothing damaged leaves this function.

        Raises:
            StoreError: too many open files, no O_DIRECT there, or the reader is closed.
        """
        bad: dict[int, str] = {}
        num_records = len(plan.locations)

        num_bytes = num_records * self._stride

        def read(part: slice) -> None:
            some = (plan.positions[part], plan.locations[part], plan.seeds[part])
            chunk = ReadPlan(*some, plan.checksums[part])
            self._read(chunk, part.start, tokens, scales, verify, bad)

        if 0 < num_records <= self._chunk and not self._direct:
            self._read(plan, 0, tokens, scales, verify, bad)
        elif num_bytes < 2 * self._threads.bytes_a_thread:
            for start in range(0, num_records, self._chunk):
                read(slice(start, start + self._chunk))
        else:
            self._threads.share(num_records, num_bytes, read, self._chunk)
        return bad

    def _read(
        self,
        plan: ReadPlan,
        start: int,
        tokens: memoryview,
        scales: memoryview | None,
        verify: bool,
        bad: dict[int, str],
    ) -> None:
        """Read and verify one chunk; note what is bad, and leave zeros in its place."""
        if self._is_unlocked and self._is_sound(plan, tokens, scales, verify):
            return
        positions = plan.positions
        views = [_views(tokens, positions, self._record_bytes)]
        if scales is not None:
            views.append(_views(scales, positions, self._scale_bytes))
        reasons = self._fill(plan, views)
        if verify:
            seeds: list[int] = plan.seeds.tolist()
            for each in reversed(views):  # the hash of its scales is the seed of an int8 record
                seeds = list(map(xxhash.xxh3_64_intdigest, each, seeds))
            wanted = plan.checksums.tolist()
            if seeds != wanted:
                misfits = [at for at in range(len(seeds)) if seeds[at] != wanted[at]]
                reasons = dict.fromkeys(misfits, MISFIT) | reasons
        for at, reason in reasons.items():
            bad[start + at] = reason
            for each in views:
                each[at][:] = bytes(len(each[at]))

    def _is_sound(
        self, plan: ReadPlan, tokens: memoryview, scales: memoryview | None, verify: bool
    ) -> bool:
        """Read and verify one chunk without the GIL; whether every record came whole and fits."""
        locations, positions, seeds = plan.locations, plan.positions, plan.seeds
        rows: Int64 = locations & MASK
        first, last = locations.item(0) >> ROW_BITS, locations.item(-1) >> ROW_BITS
        segments = [first] if first == last else (locations >> ROW_BITS).tolist()
        files = self._files.of(segments)
        if scales is not None:
            views = _views(scales, positions, self._scale_bytes)
            each = files * len(views) if first == last else files
            if not _read_runs(each, views, self._layout.scales_offset(rows), None):
                return False
            sown = map(xxhash.xxh3_64_intdigest, views, seeds.tolist())
            seeds = np.fromiter(sown, np.uint64, len(views))
        table = np.empty((5, len(locations)), np.int64)
        table[0] = files[0] if first == last else files  # sorted: most chunks lie in one
        table[1], table[3] = self._offsets(rows), seeds.view(np.int64)
        begins = np.frombuffer(tokens, np.uint8).__array_interface__["data"][0]
        np.add(positions * self._record_bytes, begins, out=table[2])
        at = table.__array_interface__["data"][0]
        num_read: int = read_and_hash(at, len(locations), self._record_bytes, verify)
        if num_read < len(locations):
            return False
        return not verify or np.array_equal(table[4].view(np.uint64), plan.checksums)

    def _fill(self, plan: ReadPlan, views: list[list[memoryview]]) -> dict[int, str]:
        """Read the tokens (and scales) of `plan` into `views`; return why some cannot be."""
        locations, count = plan.locations, len(plan.locations)
        first, last = locations.item(0), locations.item(-1)
        is_one_file = first >> ROW_BITS == last >> ROW_BITS
        segments = [first >> ROW_BITS] if is_one_file else (locations >> ROW_BITS).tolist()
        is_dense = last - first < 2 * count and self._stride == self._record_bytes
        starts = self._run_starts(locations) if is_dense else None
        rows: Int64 = locations & MASK
        files, offsets = self._files.of(segments), [self._offsets(rows)]
        if is_one_file:
            files, segments = files * count, segments * count
        read = self._read_direct if self._direct else _read_runs
        is_whole = read(files, views[0], offsets[0], starts)
        if len(views) > 1:
            offsets.append(self._layout.scales_offset(rows))
            if self._direct:
                files, read = self._cached.of(segments), _read_runs
            is_whole = is_whole and read(files, views[1], offsets[1], starts)
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
        stride, first = self._stride, np.frombuffer(views[0], np.uint8)
        address: int = first.__array_interface__["data"][0]
        if stride == self._record_bytes and address % PAGE_BYTES == 0:
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
        begins = np.empty(len(locations), np.bool_)
        begins[0] = True
        np.not_equal(locations[1:] - locations[:-1], 1, out=begins[1:])
        if self._group:  # its scales lie between two groups
            begins |= (locations & MASK) % self._group == 0
        starts: Int64 = begins.nonzero()[0]
        return starts

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


def _views(buffer: memoryview, positions: Int64, size: int) -> list[memoryview]:
    """Return the rows of `size` bytes at `positions`."""
    return [buffer[at * size : (at + 1) * size] for at in positions.tolist()]


def _read_runs(
    files: list[int], views: list[memoryview], offsets: Int64, starts: Int64 | None
) -> bool:
    """Fill all `views`, one read from each of `starts` to the next; whether all came whole."""
    size = len(views[0])
    buffers: Iterable[Sequence[memoryview]] = zip(views)
    places, wanted = offsets.tolist(), [size] * len(views)
    if starts is not None and len(starts) < len(views):
        places, edges = offsets[starts].tolist(), [*starts.tolist(), len(views)]
        files = list(map(files.__getitem__, edges[:-1]))
        runs = list(map(views.__getitem__, map(slice, edges, edges[1:])))
        buffers, wanted = runs, list(map(size.__mul__, map(len, runs)))
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
