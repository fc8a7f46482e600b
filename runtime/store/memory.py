"""Records held in memory: read and verified once, then served at the speed of a copy."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path

import numpy as np

from ...arrays import Int64, UInt8
from ...errors import StoreError
from ...machine import available_memory_bytes
from .format import StoreLayout
from .gather import Buffers, ReadPlan
from .kernel_aio import address
from .reader import SegmentReader
from .threads import CopyThreads

READ_FROM_DISK = 'open the store with access="cached"'
NOT_HELD = "it is not among the records that were loaded into memory"


class ResidentRecords:
    """All records of a plan; gathers like `SegmentReader`, and keeps no file open.

    Attributes:
        bad: place among the held records -> why it could not be read; its bytes are zero.
        num_bytes: bytes held, scales included.
        huge_page_bytes: how many of them the system put into huge pages (0: it gives none).
    """

    def __init__(self, layout: StoreLayout, locations: Int64):
        self._layout, self._locations = layout, locations
        token_bytes = len(locations) * layout.record_bytes
        self.num_bytes = token_bytes + len(locations) * layout.scale_bytes
        memory = _huge_memory(self.num_bytes)
        self._held = Buffers(layout, memory[:token_bytes], memory[token_bytes:])
        self.bad: dict[int, str] = {}
        self.huge_page_bytes = 0
        self._threads = CopyThreads()

    @classmethod
    def load(cls, reader: SegmentReader, plan: ReadPlan, layout: StoreLayout) -> ResidentRecords:
        """Read and verify every record of `plan`; a bad one is remembered, with its reason.

        Raises:
            StoreError: the memory does not suffice, or too many open files.
        """
        held = cls(layout, plan.locations)
        places = np.arange(len(plan.locations))
        whole = ReadPlan(places, plan.locations, plan.seeds, plan.checksums)
        scales = held._held.scales
        held.bad = reader.gather(
            whole,
            held._held.tokens.reshape(-1).data,
            None if scales is None else scales.reshape(-1).data,
        )
        held.huge_page_bytes = _huge_page_bytes(held._held.tokens)
        return held

    def gather(
        self,
        plan: ReadPlan,
        tokens: memoryview,
        scales: memoryview | None = None,
        *,
        verify: bool = True,
    ) -> dict[int, str]:
        """Copy records into the caller's buffers; see `SegmentReader.gather`.

        `verify` changes nothing: every record was verified when it was loaded.
        """
        if not len(plan.locations):
            return {}
        held, locations = self._held, self._locations
        places = np.searchsorted(locations, plan.locations)
        known = places < len(locations)
        known[known] = locations[places[known]] == plan.locations[known]
        places[~known] = 0
        out = Buffers(self._layout, tokens, scales)
        if known.any():
            self._copy(held.tokens, places, out.tokens, plan.positions)
            if held.scales is not None and out.scales is not None:
                self._copy(held.scales, places, out.scales, plan.positions)
        bad = dict.fromkeys(np.flatnonzero(~known).tolist(), NOT_HELD)
        if self.bad:
            found = ((at, self.bad.get(place)) for at, place in enumerate(places.tolist()))
            bad = {at: reason for at, reason in found if reason is not None} | bad
        for at in bad:
            out.clear(int(plan.positions[at]))
        return bad

    def prefetch(self, locations: Int64) -> None:
        """Do nothing: all records are in memory."""

    def close(self) -> None:
        """Let go of the memory. Calling it twice is allowed."""
        self._threads.close()
        self._held = Buffers(self._layout, memoryview(bytearray()), None)
        self._locations = np.empty(0, np.int64)

    def _copy(self, source: UInt8, places: Int64, out: UInt8, positions: Int64) -> None:
        """Copy the rows of `source` at `places` into the rows of `out` at `positions`."""
        if len(positions) != len(out):
            out[positions] = source[places]
            return
        in_order = np.empty_like(places)
        in_order[positions] = places
        self._threads.take(source, in_order, out)


Reader = SegmentReader | ResidentRecords


def _huge_memory(num_bytes: int) -> memoryview:
    """Return zeros of this process's own, in huge pages if the system gives them."""
    available = available_memory_bytes()
    if num_bytes > available:  # the system would promise it, and end the process when it is used
        raise StoreError(
            f"the store's {num_bytes:,} bytes of records do not fit into memory: this machine, or "
            f"the container, has {available:,} bytes left",
            hint=READ_FROM_DISK,
        )
    try:
        memory = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, MemoryError) as error:
        raise StoreError(
            f"the memory does not suffice to hold the store's {num_bytes} bytes of records",
            hint=READ_FROM_DISK,
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:num_bytes]


def _huge_page_bytes(array: UInt8) -> int:
    """Return how many bytes around the array Linux holds in huge pages; 0 where it cannot tell."""
    first = address(array)
    try:
        lines = Path("/proc/self/smaps").read_text("ascii", "replace").splitlines()
    except OSError:
        return 0
    found, inside = 0, False
    for line in lines:
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            start, _, stop = name.partition("-")
            inside = int(start, 16) < first + array.nbytes and first < int(stop, 16)
        elif inside and name == "AnonHugePages:":
            found += int(rest.split()[0]) << 10
    return min(found, array.nbytes)
