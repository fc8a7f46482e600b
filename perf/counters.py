"""Exact counters: numbers that a run makes and that no load of the machine changes.

- `python_calls`, `c_calls`: functions called, in Python and from Python into C.
- `allocated_blocks`: Python's memory blocks that were there at one call or return and not at the
  one before (what lives shorter is not seen); one or two come and go.
- `peak_bytes`: the most that a run holds beyond what was there before it, NumPy's arrays included.
- `read_calls`, `write_calls`, `read_bytes`, `written_bytes`: the system's own counts of the `read`
  and `write` families (not of `recv` and `send`).
- `kernel_launches`, `graph_launches`, `uploads`, `downloads`, `moved_elements`, `host_work`,
  `event_records`, `event_waits`: what a device was asked for, through `kernels/device/`.

A process that is to be counted runs under `Profile` from its start, so that all its threads do:

    python -m edje.perf.counters FILE MODULE WORDS...     runs a module, counting into FILE
"""

from __future__ import annotations

import gc
import mmap
import os
import runpy
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PROFILED = (
    *("python_calls", "c_calls", "allocated_blocks"),
    *("kernel_launches", "graph_launches", "uploads", "downloads", "moved_elements"),
    *("host_work", "event_records", "event_waits"),
)
SYSTEM = {
    "syscr": "read_calls",
    "syscw": "write_calls",
    "rchar": "read_bytes",
    "wchar": "written_bytes",
}
OPERATIONS = {
    "launch": "kernel_launches",
    "upload": "uploads",
    "download": "downloads",
    "submit": "host_work",
    "record": "event_records",
    "synchronize": "event_waits",
}
DEVICES = os.path.join("kernels", "device", "")
SETTLE_S, SETTLED = 0.005, 3
ARMED = len(PROFILED)  # place of what switches a profile on, behind the counts
SIZE = 8 * (len(PROFILED) + 1)
CALLS, C_CALLS, BLOCKS = 0, 1, 2  # places in PROFILED
MOVED = PROFILED.index("moved_elements")

Counts = dict[str, int]


class Profile:
    """Counts calls, blocks and device operations of all threads into shared memory.

    Only while it is armed: counting blocks walks through all that Python has.
    """

    def __init__(self, memory: mmap.mmap):
        """Count into `memory`, of `SIZE` bytes."""
        self.values = memoryview(memory).cast("q")
        self._operations: dict[CodeType, int] = {}
        self._num_blocks = 0

    def install(self) -> None:
        """Begin, for this thread and all that start from now on."""
        threading.setprofile(self)
        sys.setprofile(self)

    def arm(self, wanted: bool) -> None:
        """Count from now on, or no longer; whoever shares the memory may say so."""
        self.values[ARMED] = wanted

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        """Count one event; Python calls this."""
        values = self.values
        if not values[ARMED]:
            self._num_blocks = 0
            return
        now = sys.getallocatedblocks()
        if now > self._num_blocks > 0:
            values[BLOCKS] += now - self._num_blocks
        if event == "call":
            values[CALLS] += 1
            at = self._operations.get(frame.f_code)
            if at is None:
                at = self._operations[frame.f_code] = _operation(frame)
            if at >= 0:
                values[at] += 1
                values[MOVED] += frame.f_locals.get("num_elements", 0)
        elif event == "c_call":
            values[C_CALLS] += 1
        self._num_blocks = sys.getallocatedblocks()


def _operation(frame: FrameType) -> int:
    """Return which count a call of this function raises, -1: none."""
    code = frame.f_code
    name = OPERATIONS.get(code.co_name) if DEVICES in code.co_filename else None
    if name is None:
        return -1
    is_graph = "Graph" in type(frame.f_locals.get("self")).__name__
    return PROFILED.index("graph_launches" if name == "kernel_launches" and is_graph else name)


class Counters:
    """Counts what a run makes, in this process and those that it started."""

    def __init__(self, own: Profile, others: Sequence[Profile], pids: Sequence[int]):
        """Count what `own` and `others` see, and what the system knows of the processes `pids`."""
        self._own, self._others = own, others
        self._pids = pids
        self._nothing = self._least([self._once(lambda: None) for _ in range(5)])

    def of(self, run: Callable[[], object], repeats: int) -> dict[str, tuple[int, int]]:
        """Return the least and the greatest count of so many runs, by name; 0 are left out.

        Both are the same where the counter is exact.
        """
        gc.collect()
        gc.disable()
        try:
            run()
            self._once(run)  # what a first armed run makes is its own
            found = [self._once(run) for _ in range(repeats)]
            peaks = _peaks(run, repeats)
        finally:
            gc.enable()
        ranges = {}
        for name, nothing in self._nothing.items():
            values = [max(0, counts[name] - nothing) for counts in found]
            ranges[name] = (min(values), max(values))
        ranges["peak_bytes"] = (min(peaks), max(peaks))
        return ranges

    def _once(self, run: Callable[[], object]) -> Counts:
        """Return what one run makes; what this process does to find out is not in it."""
        for other in self._others:
            other.arm(True)
        before = self._profiled(self._others)
        system = system_counts(self._pids, with_own=True)
        began = self._profiled([self._own])
        self._own.arm(True)
        run()
        self._own.arm(False)
        own = self._profiled([self._own])
        self._settle()
        behind, after = system_counts(self._pids), self._profiled(self._others)
        for other in self._others:
            other.arm(False)
        columns = zip(PROFILED, own, began, after, before, strict=True)
        found = {name: one - two + three - four for name, one, two, three, four in columns}
        return found | {name: value - system[name] for name, value in behind.items()}

    def _settle(self) -> None:
        """Wait until the others have come to rest: a server tidies up behind its answer."""
        calm, last = 0, self._profiled(self._others)
        while self._others and calm < SETTLED:
            time.sleep(SETTLE_S)
            found = self._profiled(self._others)
            calm, last = (calm + 1 if found == last else 0), found

    def _profiled(self, profiles: Sequence[Profile]) -> list[int]:
        every = [profile.values[:ARMED].tolist() for profile in profiles]
        return [sum(column) for column in zip(*every, strict=True)] or [0] * ARMED

    def _least(self, found: Sequence[Counts]) -> Counts:
        return {name: min(counts[name] for counts in found) for name in found[0]}


def system_counts(pids: Sequence[int], *, with_own: bool = False) -> Counts:
    """Return what the system has counted for these processes together, this one first.

    Zeros where it does not count. `with_own`: what this very call reads, and counts next time, too.
    """
    total = dict.fromkeys(SYSTEM.values(), 0)
    for pid in pids:
        try:
            file = os.open(f"/proc/{pid}/io", os.O_RDONLY)
        except OSError:
            continue
        try:
            text = os.read(file, 4096)
        finally:
            os.close(file)
        if with_own:
            total["read_calls"] += 1
            total["read_bytes"] += len(text)
        for line in text.decode("ascii").splitlines():
            name, _, value = line.partition(": ")
            if name in SYSTEM:
                total[SYSTEM[name]] += int(value)
    return total


def _peaks(run: Callable[[], object], repeats: int) -> list[int]:
    """Return the bytes that each run holds at most, beyond what was held before."""
    tracemalloc.start(1)
    try:
        run()
        found = []
        for _ in range(repeats):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            run()
            found.append(tracemalloc.get_traced_memory()[1] - before)
        return found
    finally:
        tracemalloc.stop()


def open_shared(path: Path | None) -> mmap.mmap:
    """Return memory for counts: in a file that others can read, or of this process alone."""
    if path is None:
        return mmap.mmap(-1, SIZE)
    with path.open("a+b") as file:
        file.truncate(SIZE)
        return mmap.mmap(file.fileno(), SIZE)


if __name__ == "__main__":
    file, module, *words = sys.argv[1:]
    sys.argv = [module, *words]
    Profile(open_shared(Path(file))).install()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
