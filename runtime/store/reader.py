"""Reading records: rows -> the caller's buffer, by a few threads, every record verified."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from ...arrays import Int64
from .descriptors import SegmentFiles
from .format import ROW_BITS, ROW_MASK, StoreLayout
from .gather import Buffers, Files, Gather, ReadPlan, Worker, run_starts
from .threads import MOST_READING, CopyThreads

__all__ = ["Access", "BadRecord", "ReadPlan", "SegmentReader"]

Access = Literal["cached", "direct"]

# So that the description of a huge read stays small beside the read itself.
MAX_RECORDS_A_GATHER = 1 << 14
# Records that are looked for in the page cache before the system is asked to fetch a batch.
NUM_PROBES = 8
# Once so many batches in a row were there, one record of every fourth batch is enough: looking for
# eight takes a fifth of the time of reading 64.
CALM_BATCHES, LOOKED_AFTER = 16, 4


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


class _Process:
    """What a forked child must not share with its parent: files in use, queues, threads."""

    def __init__(self, make_files: Callable[[], Files]):
        self.files = make_files()
        self.threads = CopyThreads(MOST_READING)
        self.num_cached = 0  # batches in a row that prefetching found in the page cache
        self._idle: list[Worker] = []
        self._closed = False

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        """Lend a worker that nobody else uses meanwhile."""
        try:
            worker = self._idle.pop()  # in one step, so that two threads never get the same
        except IndexError:
            worker = Worker()
        try:
            yield worker
        except BaseException:
            worker.close()
            raise
        self._idle.append(worker)
        if self._closed:
            self._close_idle()

    def carry_out(self, gather: Gather, num_threads: int) -> None:
        """Read all chunks, by the calling thread and, if it pays, by others beside it."""
        chunks = iter(range(gather.num_chunks))

        def serve() -> None:
            with self.worker() as worker:
                for chunk in chunks:  # every thread takes the next that none has taken
                    gather.read(chunk, worker, self.files.cached)

        self.threads.run(serve, min(num_threads, gather.num_chunks))

    def retire(self) -> None:
        """Close everything that is not in use, and what is used later as it is given back."""
        self._closed = True
        self.threads.close()
        self.files.retire()
        self._close_idle()

    def close(self) -> None:
        """Close everything; what is in use is closed as it is given back."""
        self._closed = True
        self.threads.close()
        self.files.close()
        self._close_idle()

    def _close_idle(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.pop().close()


class SegmentReader:
    """Reads records of one store; safe to use from several threads, and in a forked child.

    Args:
        folder: the store's.
        layout: the store's.
        key_of: returns the key that a segment's header page must hold, None for no segment.
        access: `"cached"` reads through the system's page cache; `"direct"` past it (O_DIRECT),
            for a store much larger than memory.
    """

    def __init__(
        self,
        folder: Path,
        layout: StoreLayout,
        *,
        key_of: Callable[[int], int | None],
        access: Access = "cached",
    ):
        self._folder, self._layout, self._key_of = folder, layout, key_of
        self._direct = access == "direct"
        self._processes: dict[int, _Process] = {}

    @property
    def way(self) -> str:
        """How reads reach the system: `"kernel AIO"`, or `"pread"` where that is not offered."""
        with self._process().worker() as worker:
            return worker.queue().way

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
        process = self._process()
        buffers = Buffers(self._layout, tokens, scales)
        bad: dict[int, str] = {}
        for part in _parts(plan.locations, process.files.cached.max_open // 4):
            num_threads = process.threads.count_for((part.stop - part.start) * self._layout.stride)
            gather = Gather(
                plan.part(part),
                self._layout,
                buffers,
                direct=self._direct,
                verify=verify,
                num_threads=num_threads,
            )
            with gather.opened(process.files):
                process.carry_out(gather, num_threads)
            bad |= {part.start + place: reason for place, reason in gather.bad.items()}
        return bad

    def prefetch(self, locations: Int64) -> None:
        """Ask the system to read records into its page cache in the background; a hint.

        `locations`: int64 [N], in any order. Does nothing with `"direct"`.
        """
        if self._direct or not len(locations) or not hasattr(os, "posix_fadvise"):
            return
        process = self._process()
        is_calm = process.num_cached >= CALM_BATCHES
        process.num_cached += 1
        if is_calm and process.num_cached % LOOKED_AFTER:
            return
        files, num_probes = process.files.cached, 1 if is_calm else NUM_PROBES
        if self._seem_cached(files, np.sort(locations[:: -(-len(locations) // num_probes)])):
            return
        process.num_cached, ordered = 0, np.sort(locations)
        for part in _parts(ordered, files.max_open // 4):
            self._advise(files, ordered[part])

    def retire(self) -> None:
        """Keep no file open any more, but for the reads of those who still have this reader."""
        self._process().retire()

    def close(self) -> None:
        """Close all files. Calling it twice is allowed."""
        self._process().close()

    def _advise(self, files: SegmentFiles, locations: Int64) -> None:
        """Advise to read runs of records, and their scales."""
        layout, starts = self._layout, run_starts(locations, None, self._layout, len(locations))
        rows, counts = locations[starts] & ROW_MASK, np.diff(starts, append=len(locations))
        with files.lend(locations[starts] >> ROW_BITS) as lent, suppress(OSError):
            _will_need(lent, layout.offset(rows), counts * layout.stride)
            if layout.scale_bytes:
                _will_need(lent, layout.scales_offset(rows), counts * layout.scale_bytes)

    def _seem_cached(self, files: SegmentFiles, probes: Int64) -> bool:
        """Whether these few records, sorted, are in the page cache."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        byte, offsets = bytearray(1), self._layout.offset(probes & ROW_MASK).tolist()
        with files.lend(probes >> ROW_BITS) as lent:
            try:
                for descriptor, offset in zip(lent.tolist(), offsets, strict=True):
                    if descriptor >= 0:
                        os.preadv(descriptor, [byte], offset, os.RWF_NOWAIT)
            except OSError:  # it would wait for the disk, or the file system cannot tell
                return False
        return True

    def _process(self) -> _Process:
        """Return what this process reads with: after a fork the child makes its own."""
        pid = os.getpid()
        process = self._processes.get(pid)
        if process is None:
            process = self._processes.setdefault(pid, _Process(self._open_files))
            for other in self._processes.keys() - {pid}:
                inherited = self._processes.pop(other, None)
                if inherited is not None:
                    inherited.files.abandon()
        return process

    def _open_files(self) -> Files:
        arguments = (self._folder, self._layout, self._key_of)
        if not self._direct:
            cached = SegmentFiles(*arguments)
            return Files(cached, cached)
        # Both kinds together: half of what the process may open.
        cached, direct = (
            SegmentFiles(*arguments, share=4),
            SegmentFiles(*arguments, share=4, direct=True),
        )
        return Files(direct, cached)


def _parts(locations: Int64, max_segments: int) -> Iterator[slice]:
    """Cut sorted locations where they need more segments than should be open, or grow long."""
    if not len(locations):
        return
    num_segments = int(locations[-1] >> ROW_BITS) - int(locations[0] >> ROW_BITS) + 1
    if num_segments <= max_segments and len(locations) <= MAX_RECORDS_A_GATHER:
        yield slice(0, len(locations))  # as nearly always
        return
    begins = np.diff(locations >> ROW_BITS, prepend=-1) != 0
    limit = (np.cumsum(begins) - 1) // max(1, max_segments)
    cuts = np.flatnonzero(np.diff(limit)) + 1
    edges = np.union1d(cuts, np.arange(0, len(limit), MAX_RECORDS_A_GATHER)).tolist()
    for start, stop in pairwise([*edges, len(limit)]):
        yield slice(start, stop)


def _will_need(descriptors: Int64, offsets: Int64, num_bytes: Int64) -> None:
    spans = zip(descriptors.tolist(), offsets.tolist(), num_bytes.tolist(), strict=True)
    for descriptor, offset, size in spans:
        if descriptor >= 0:  # a file that cannot be opened is named when it is read
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
