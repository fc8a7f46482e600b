"""Records held in memory: read and verified once, then served at the speed of a copy."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np

from ...arrays import CopyThreads, Int64, UInt8
from ...errors import StoreError
from ...machine import available_memory_bytes
from .format import StoreLayout
from .open_files import CACHED
from .read import SegmentReader
from .records import ReadPlan

NOT_HELD = "it is not among the records that were loaded into memory"


class ResidentRecords:
    """All records of a plan; gathers like `SegmentReader`, and keeps no file open.

    Attributes:
        bad: place among the held records -> why it could not be read; its bytes are zero.
    """

    def __init__(self, layout: StoreLayout, locations: Int64):
        count, record_bytes, scale_bytes = len(locations), layout.record_bytes, layout.scale_bytes
        # One row more than there are records, which stays zero, for what is not held.
        each = record_bytes + scale_bytes
        memory = _huge_memory(count * each, more=each)
        token_bytes = (count + 1) * record_bytes
        self._tokens = _rows(memory[:token_bytes], record_bytes)
        self._scales = _rows(memory[token_bytes:], scale_bytes) if scale_bytes else None
        self._locations = np.append(locations, np.iinfo(np.int64).max)
        self.bad: dict[int, str] = {}
        self._threads = CopyThreads()

    @classmethod
    def load(cls, reader: SegmentReader, plan: ReadPlan, layout: StoreLayout) -> ResidentRecords:
        """Read and verify every record of `plan`; a bad one is remembered, with its reason.

        Raises:
            StoreError: the memory does not suffice, or too many open files.
        """
        held, count = cls(layout, plan.locations), len(plan.locations)
        scales = None if held._scales is None else held._scales[:count].reshape(-1).data
        tokens = held._tokens[:count].reshape(-1).data
        held.bad = reader.gather(plan._replace(positions=np.arange(count)), tokens, scales)
        return held

    def gather(
        self,
        plan: ReadPlan,
        tokens: memoryview,
        scales: memoryview | None,
        *,
        verify: bool = True,
    ) -> dict[int, str]:
        """As `SegmentReader.gather`; `verify` changes nothing, since `load` has verified all."""
        held, held_scales, locations = self._tokens, self._scales, self._locations
        places = np.searchsorted(locations, plan.locations)
        known, bad = locations[places] == plan.locations, dict[int, str]()
        if not known.all():
            places[~known] = len(held) - 1
            bad = dict.fromkeys(np.flatnonzero(~known).tolist(), NOT_HELD)
        if self.bad:
            reasons = ((at, self.bad.get(place)) for at, place in enumerate(places.tolist()))
            bad |= {at: reason for at, reason in reasons if reason is not None}
        in_order = np.empty_like(places)
        in_order[plan.positions] = places
        self._threads.take(held, in_order, _rows(tokens, held.shape[1]))
        if held_scales is not None and scales is not None:
            self._threads.take(held_scales, in_order, _rows(scales, held_scales.shape[1]))
        return bad

    def prefetch(self, locations: Int64) -> None:
        """Do nothing: all records are in memory."""

    def retire(self) -> None:
        """Do nothing: no file is open."""

    def close(self) -> None:
        """Let go of the memory. Calling it twice is allowed."""
        self._threads.close()
        self._locations = self._locations[-1:]  # first, for whoever reads at this moment
        self._tokens = self._tokens[-1:].copy()
        self._scales = None if self._scales is None else self._scales[-1:].copy()


Reader = SegmentReader | ResidentRecords


def _rows(memory: memoryview, size: int) -> UInt8:
    return np.frombuffer(memory, np.uint8).reshape(-1, size)


def _huge_memory(num_bytes: int, more: int) -> memoryview:
    """Return zeros of this process's own, `more` than it asks for, in huge pages if it can be."""
    available = available_memory_bytes()
    if num_bytes > available:  # the system would promise it, and end the process when it is used
        raise StoreError(
            f"the store's {num_bytes:,} bytes of records do not fit into memory: this machine, or "
            f"the container, has {available:,} bytes left",
            hint=CACHED,
        )
    try:
        memory = mmap.mmap(-1, num_bytes + more, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, MemoryError) as error:
        what = f"the memory does not suffice to hold the store's {num_bytes} bytes of records"
        raise StoreError(what, hint=CACHED) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)
