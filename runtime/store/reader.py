"""Reading records: rows -> `preadv` into the caller's buffer, every record verified."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Lock

import numpy as np
import xxhash

from ...errors import StoreError
from .catalog import ROW_BITS, Int64, UInt64
from .layout import PAGE_BYTES, SEGMENTS, StoreLayout, header_fault, segment_name

# Linux takes at most 1,024 pieces a call; a padded record is two.
MAX_RECORDS_A_READ = 512


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


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What to read, sorted by location, each [N]: where to, from where, and what it must hash to.

    `positions` int64: rows of the caller's buffer; `locations` int64; `seeds`, `checksums` uint64.
    """

    positions: Int64
    locations: Int64
    seeds: UInt64
    checksums: UInt64


class SegmentReader:
    """Open segment files of one store; safe to use from several threads."""

    def __init__(self, folder: Path, layout: StoreLayout):
        self._folder = folder / SEGMENTS
        self._layout = layout
        self._descriptors: dict[int, int] = {}
        self._lock = Lock()
        self._padding = memoryview(bytearray(layout.stride - layout.record_bytes))

    def gather(self, plan: ReadPlan, out: memoryview) -> dict[int, str]:
        """Read and verify every record of `plan` into `out`; return the reason of each bad one.

        `out` holds bytes [N * record_bytes]; keys are places in the plan. The bytes of a bad
        record are set to zero, so that nothing unverified leaves this function.
        """
        size = self._layout.record_bytes
        slices = [out[at * size : (at + 1) * size] for at in plan.positions.tolist()]
        seeds, checksums = plan.seeds.tolist(), plan.checksums.tolist()
        bad: dict[int, str] = {}
        for start, stop in _runs(plan.locations):
            bad |= self._read_run(plan, slices, start, stop)
            for at in range(start, stop):
                if at in bad:
                    continue
                if xxhash.xxh3_64_intdigest(slices[at], seeds[at]) != checksums[at]:
                    bad[at] = "its bytes do not fit its checksum"
        for at in bad:
            slices[at][:] = bytes(size)
        return bad

    def close(self) -> None:
        """Close all files. Calling it twice is allowed."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def _read_run(
        self, plan: ReadPlan, slices: list[memoryview], start: int, stop: int
    ) -> dict[int, str]:
        """Read consecutive rows in one call; after a failure, one by one to find the bad ones."""
        location = int(plan.locations[start])
        segment, row = location >> ROW_BITS, location & ((1 << ROW_BITS) - 1)
        descriptor = self._open(segment)
        if isinstance(descriptor, str):
            return dict.fromkeys(range(start, stop), descriptor)
        reason = self._preadv(descriptor, slices[start:stop], self._layout.offset(row))
        if reason is None:
            return {}
        if stop - start == 1:
            return {start: reason}
        found: dict[int, str] = {}
        for at in range(start, stop):
            found |= self._read_run(plan, slices, at, at + 1)
        return found

    def _preadv(self, descriptor: int, records: list[memoryview], offset: int) -> str | None:
        """Fill `records` from `offset` on; return None, or why they could not be filled."""
        buffers = records
        if len(self._padding):
            buffers = [piece for record in records for piece in (record, self._padding)][:-1]
        expected = sum(map(len, buffers))
        try:
            got = os.preadv(descriptor, buffers, offset)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None if got == expected else f"its segment file ends {expected - got} bytes early"

    def _open(self, segment: int) -> int | str:
        """Return the descriptor of a segment, or why its file cannot be used."""
        descriptor = self._descriptors.get(segment)
        if descriptor is not None:
            return descriptor
        with self._lock:
            if segment not in self._descriptors:
                opened = _open_segment(self._folder, self._layout, segment)
                if isinstance(opened, str):
                    return opened
                self._descriptors[segment] = opened
            return self._descriptors[segment]


def _open_segment(folder: Path, layout: StoreLayout, segment: int) -> int | str:
    path = folder / segment_name(segment)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # no fault of the store
            raise StoreError(
                f"cannot open {path}: {error.strerror}",
                hint="raise the limit of open files (`ulimit -n`)",
            ) from error
        return f"its file {path.name} cannot be opened ({error.strerror})"
    try:
        fault = header_fault(os.pread(descriptor, PAGE_BYTES, 0), layout, segment)
    except OSError as error:
        fault = f"its header page cannot be read ({error.strerror})"
    if fault:
        os.close(descriptor)
        return f"its file {path.name} cannot be used: {fault}"
    return descriptor


def _runs(locations: Int64) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of consecutive rows, none longer than one call takes."""
    breaks = np.flatnonzero(np.diff(locations) != 1) + 1
    edges = [0, *breaks.tolist(), len(locations)]
    for start, stop in pairwise(edges):
        for first in range(start, stop, MAX_RECORDS_A_READ):
            yield first, min(first + MAX_RECORDS_A_READ, stop)
