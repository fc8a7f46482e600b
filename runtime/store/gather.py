"""One gather: its records cut into chunks, merged into reads, carried out, verified.

A chunk is what one thread reads and then hashes while the bytes are still in its cache. Records
of one chunk that follow one another in the file and in the buffer are one read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap

import numpy as np
import numpy.typing as npt
import xxhash

from ...arrays import Int64, UInt8, UInt64
from .descriptors import SegmentFiles
from .format import PAGE_BYTES, ROW_BITS, ROW_MASK, StoreLayout
from .kernel_aio import (
    ADDRESS,
    FILE,
    FILE_BITS,
    NUM_BYTES,
    OFFSET,
    QUEUE_DEPTH,
    WANTED,
    PreadQueue,
    ReadBatch,
    ReadQueue,
    address,
    open_queue,
)

# Through the page cache: small enough to stay in a core's second-level cache until hashed.
CACHED_CHUNK_BYTES = 1536 << 10
# Past it the device should have much to do at once.
DIRECT_CHUNK_BYTES = 4 << 20
# As many reads one by one take no longer than together.
FEW_READS = 4

MISFIT = "its bytes do not fit its checksum"


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What to read, sorted by location, each [N]: where to, from where, and what it must hash to.

    `positions` int64: rows of the caller's buffer; `locations` int64; `seeds`, `checksums` uint64.
    """

    positions: Int64
    locations: Int64
    seeds: UInt64
    checksums: UInt64

    def part(self, places: slice | npt.NDArray[np.bool_]) -> ReadPlan:
        """Return the plan of some of its places."""
        return ReadPlan(
            self.positions[places],
            self.locations[places],
            self.seeds[places],
            self.checksums[places],
        )


class Buffers:
    """The caller's memory, a row a record: `tokens` uint8 [N, record bytes], `scales` too."""

    def __init__(self, layout: StoreLayout, tokens: memoryview, scales: memoryview | None):
        self.tokens = np.frombuffer(tokens, np.uint8).reshape(-1, layout.record_bytes)
        self.scales: UInt8 | None = None
        if layout.scale_bytes:  # without them nothing can be verified
            room = bytearray(len(self.tokens) * layout.scale_bytes) if scales is None else scales
            self.scales = np.frombuffer(room, np.uint8).reshape(-1, layout.scale_bytes)

    @property
    def are_aligned(self) -> bool:
        """Whether every record's place starts a page, as O_DIRECT wants it."""
        return address(self.tokens) % PAGE_BYTES == 0 and self.tokens.shape[1] % PAGE_BYTES == 0

    def records(self, positions: Int64) -> tuple[list[memoryview], list[memoryview] | None]:
        """Return the places of the tokens and of the scales of each record."""
        tokens = _slices(self.tokens, positions)
        return tokens, None if self.scales is None else _slices(self.scales, positions)

    def clear(self, position: int) -> None:
        """Set one record's place to zero: nothing damaged leaves the store."""
        self.tokens[position] = 0
        if self.scales is not None:
            self.scales[position] = 0


@dataclass(frozen=True, slots=True)
class Files:
    """Where records are read from: `tokens` past the page cache with access "direct"."""

    tokens: SegmentFiles
    cached: SegmentFiles

    def retire(self) -> None:
        """Keep no file open that is not in use."""
        self.tokens.retire()
        self.cached.retire()

    def close(self) -> None:
        """Close all files; those in use as soon as they are given back."""
        self.tokens.close()
        self.cached.close()

    def abandon(self) -> None:
        """Close what a forked child has inherited."""
        self.tokens.abandon()
        self.cached.abandon()


class Worker:
    """What one thread reads with: queues, and aligned memory where the caller's is not."""

    def __init__(self) -> None:
        self._queue: ReadQueue | None = None
        self._pread = PreadQueue()
        self._aligned: mmap | None = None

    def queue(self, num_reads: int = QUEUE_DEPTH, *, direct: bool = False) -> ReadQueue:
        """Return the queue for so many reads at once."""
        # The kernel takes 40 ms to close its queue: who only ever reads a little has none.
        if num_reads <= (1 if direct else FEW_READS):
            return self._pread
        if self._queue is None:
            self._queue = open_queue()
        return self._queue

    def close(self) -> None:
        """Give the queue back. Can be called twice; not while it reads."""
        if self._queue is not None:
            self._queue.give_back()
            self._queue = None

    def aligned(self, num_bytes: int) -> UInt8:
        """Return uint8 [num_bytes] from a page's start on: the worker's, until the next call."""
        if self._aligned is None or len(self._aligned) < num_bytes:
            self._aligned = mmap(-1, num_bytes)
        return np.frombuffer(self._aligned, np.uint8, num_bytes)


class Gather:
    """The reads of one `ReadPlan`, of one record or more, into the caller's buffers.

    Attributes:
        bad: place in the plan -> reason; complete when every chunk was read.
        num_chunks: chunks to be read once each, by any thread, in any order.
    """

    def __init__(
        self,
        plan: ReadPlan,
        layout: StoreLayout,
        buffers: Buffers,
        *,
        direct: bool,
        verify: bool,
        num_threads: int = 1,
    ):
        self.bad: dict[int, str] = {}
        self._plan, self._layout, self._buffers = plan, layout, buffers
        self._rows, num_records = plan.locations & ROW_MASK, len(plan.locations)
        self._direct, self._verify = direct, verify
        self._bounces = direct and not buffers.are_aligned
        self._num_columns = 2 if buffers.scales is not None else 1
        size = records_a_chunk(layout, num_records, num_threads, direct=direct)
        first = first_chunk(size, num_threads, direct=direct)
        self._first_places = [0, *range(first, num_records, size), num_records]
        self.num_chunks = len(self._first_places) - 1
        # Bounced, tokens may go anywhere; else, read together, the padding would be in the way.
        positions = None if self._bounces and buffers.scales is None else plan.positions
        padded = layout.stride > layout.record_bytes and not self._bounces
        self._starts = run_starts(plan.locations, positions, layout, 1 if padded else size, first)
        self._edges, num_runs = self._first_places, len(self._starts)
        if num_runs < num_records:  # nearly always each record is a read of its own
            self._edges = np.searchsorted(self._starts, self._first_places).tolist()
        self._batch = ReadBatch(num_runs * self._num_columns)
        self._reads = self._batch.reads.reshape(num_runs, self._num_columns, -1)
        self._describe_reads()

    def read(self, chunk: int, worker: Worker, files: SegmentFiles) -> None:
        """Read one chunk into the caller's buffers; note what is bad, with zeros in its place.

        What goes wrong is read again one by one, from `files`.
        """
        start, stop = self._edges[chunk : chunk + 2]
        first, last = self._first_places[chunk : chunk + 2]
        bounce = self._aim_at_bounce(chunk, worker) if self._bounces else None
        width = self._num_columns
        queue = worker.queue(stop - start, direct=self._direct)
        failed = queue.read(self._batch, start * width, stop * width)
        if bounce is not None:
            records = bounce[:, : self._layout.record_bytes]
            self._buffers.tokens[self._plan.positions[first:last]] = records
        bad: dict[int, str] = {}
        for run in {at // width for at in failed}:
            bad |= self._read_one_by_one(run, files)
        if self._verify:
            bad = dict.fromkeys(self._misfits(first, last), MISFIT) | bad
        for place in bad:
            self._buffers.clear(int(self._plan.positions[place]))
        self.bad |= bad

    @contextmanager
    def opened(self, files: Files) -> Iterator[None]:
        """Keep the files open that the reads need; a file that cannot be opened fails its reads."""
        segments = self._plan.locations[self._starts] >> ROW_BITS
        with files.tokens.lend(segments) as lent:
            self._reads[:, :, FILE] = (lent << FILE_BITS)[:, None]
            if self._num_columns == 1 or files.cached is files.tokens:
                yield
                return
            with files.cached.lend(segments) as lent_for_scales:
                self._reads[:, 1, FILE] = lent_for_scales << FILE_BITS
                yield

    def _aim_at_bounce(self, chunk: int, worker: Worker) -> UInt8:
        """Let the chunk's records be read into aligned memory: uint8 [n, stride]."""
        (first, last), stride = self._first_places[chunk : chunk + 2], self._layout.stride
        bounce = worker.aligned((last - first) * stride).reshape(-1, stride)
        runs = slice(*self._edges[chunk : chunk + 2])
        aims = address(bounce) + (self._starts[runs] - first) * stride
        self._reads[runs, 0, ADDRESS] = aims
        return bounce

    def _read_one_by_one(self, run: int, files: SegmentFiles) -> dict[int, str]:
        """Read the records of a run that went wrong each by itself; return the bad ones."""
        starts, num_records = self._starts[run : run + 2].tolist(), len(self._rows)
        places = range(starts[0], starts[1] if len(starts) > 1 else num_records)
        segment = int(self._plan.locations[starts[0]]) >> ROW_BITS
        with files.use([segment]) as found:
            descriptor = found[segment]
            if isinstance(descriptor, str):
                return dict.fromkeys(places, descriptor)
            reasons = {place: self._read_record(place, descriptor) for place in places}
        return {place: reason for place, reason in reasons.items() if reason is not None}

    def _read_record(self, place: int, descriptor: int) -> str | None:
        row = int(self._rows[place])
        tokens, scales = self._buffers.records(self._plan.positions[place : place + 1])
        reason = _read_whole(descriptor, tokens[0], self._layout.offset(row))
        if reason is None and scales is not None:
            return _read_whole(descriptor, scales[0], self._layout.scales_offset(row))
        return reason

    def _misfits(self, first: int, last: int) -> list[int]:
        """Return those of the places [first, last) whose records do not fit their checksums."""
        plan, part, digest = self._plan, slice(first, last), xxhash.xxh3_64_intdigest
        tokens, scales = self._buffers.records(plan.positions[part])
        seeds: list[int] = plan.seeds[part].tolist()
        if scales is not None:
            seeds = list(map(digest, scales, seeds))
        found, wanted = list(map(digest, tokens, seeds)), plan.checksums[part].tolist()
        if found == wanted:
            return []
        return [first + at for at in range(len(found)) if found[at] != wanted[at]]

    def _describe_reads(self) -> None:
        """Say what every read takes from where to where: a run's tokens, then (int8) its scales."""
        layout, buffers, rows = self._layout, self._buffers, self._rows
        positions = self._plan.positions
        counts: int | Int64 = 1
        if len(self._starts) < len(rows):
            positions, rows = positions[self._starts], rows[self._starts]
            counts = np.diff(self._starts, append=len(self._rows))
        # Whole pages into aligned memory, or else no padding.
        size = layout.stride if self._bounces else layout.record_bytes
        _describe(self._reads[:, 0], buffers.tokens, positions, counts * size, layout.offset(rows))
        if buffers.scales is not None:
            size, offsets = layout.scale_bytes, layout.scales_offset(rows)
            _describe(self._reads[:, 1], buffers.scales, positions, counts * size, offsets)


def _describe(
    reads: Int64, out: UInt8, positions: Int64, num_bytes: int | Int64, offsets: Int64
) -> None:
    """Write into `reads` int64 [N, 8] which bytes come from `offsets` into rows of `out`."""
    reads[:, WANTED] = reads[:, NUM_BYTES] = num_bytes
    reads[:, ADDRESS] = positions * out.shape[1] + address(out)
    reads[:, OFFSET] = offsets


def records_a_chunk(
    layout: StoreLayout, num_records: int, num_threads: int, *, direct: bool
) -> int:
    """Return how many records to read at once: all threads get equally many chunks.

    Their reads always fit a queue. See `first_chunk` for the one that is shorter.
    """
    num_bytes = DIRECT_CHUNK_BYTES if direct else CACHED_CHUNK_BYTES
    most = QUEUE_DEPTH // (2 if layout.scale_bytes else 1)
    most = max(1, min(num_bytes // layout.stride, most))
    rounds = -(-num_records // (most * num_threads))
    return -(-num_records // (rounds * num_threads))


def first_chunk(size: int, num_threads: int, *, direct: bool) -> int:
    """Return how many records of `size` a chunk the first chunk has: half, for several threads.

    Only one thread hashes at a time (the GIL). Two that read equally much from the start on would
    both want to at the same time, and who has to wait for it must then be woken, too.
    """
    return max(1, size // 2) if num_threads > 1 and not direct else size


def run_starts(
    locations: Int64,
    positions: Int64 | None,
    layout: StoreLayout,
    max_records: int,
    first: int = 0,
) -> Int64:
    """Return where runs of records that one read takes begin; `locations` is not empty.

    They lie behind one another in the file and, if `positions` are given, in the buffer. A run
    also ends at a group's border (int8), after `first` records, and then with every `max_records`.
    """
    follows = locations[1:] - locations[:-1] == 1
    if positions is not None:
        follows &= positions[1:] - positions[:-1] == 1
    if max_records == 1 or not follows.any():
        return np.arange(len(locations))  # as nearly always
    begins = np.ones(len(locations), np.bool_)
    np.logical_not(follows, out=begins[1:])
    if layout.group_records:
        begins |= (locations & ROW_MASK) % layout.group_records == 0
    begins[first::max_records] = True
    return np.flatnonzero(begins)


def _slices(rows: UInt8, positions: Int64) -> list[memoryview]:
    """Return the bytes of the rows at `positions`."""
    content, size = rows.reshape(-1).data, rows.shape[1]
    return [content[at : at + size] for at in (positions * size).tolist()]


def _read_whole(descriptor: int, buffer: memoryview, offset: int) -> str | None:
    """Fill `buffer` from `offset` on; return None, or why it could not be filled."""
    done = 0
    while done < len(buffer):
        try:
            got = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if not got:
            return f"its segment file ends {len(buffer) - done} bytes early"
        done += got
    return None
