"""Arrays: aliases, one in a GPU's memory, even parts of one, rows copied by a few threads."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .machine import usable_cores

Array = npt.NDArray[Any]
Bool = npt.NDArray[np.bool_]
UInt8 = npt.NDArray[np.uint8]
Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A C-contiguous array in a GPU's memory, owned by whoever allocated it.

    It stands where a NumPy array would in a `Batch` and for `scores`: an engine on a GPU takes
    these only, an engine on the CPU never. Nothing here reads or writes the memory.

    Attributes:
        address: of the first element, in the device's address space.
        shape: number of elements in each dimension.
        dtype: NumPy's name of the element type.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Return some of the rows as a view, as NumPy does; steps are not taken."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"rows of a DeviceArray come one after the other, got step {step}")
        shape = (max(stop - start, 0), *self.shape[1:])
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(self.address + start * row_bytes, shape, self.dtype)


def even_parts(num_pairs: int, most: int) -> Iterator[slice]:
    """Cut `num_pairs` into the fewest slices of at most `most`, equal within one; 0 into none."""
    num_parts = -(-num_pairs // most)
    ends = [num_pairs * part // max(1, num_parts) for part in range(num_parts + 1)]
    return (slice(start, end) for start, end in pairwise(ends))


# Few cores are the engine's, too; on the 16 cores of an H200's host 1, 2, 4 and 8 threads copy
# 49 kB records at 5, 10, 20 and 31 GB/s.
FEW_THREADS, MOST_COPYING = 4, 8
# Waking a thread takes as long as copying this much.
BYTES_A_THREAD = 1 << 20


@cache
def copying_threads() -> int:
    """Return how many threads may copy at once on this machine, as it was when first asked."""
    cores = usable_cores()
    return min(cores, max(FEW_THREADS, cores // 2), MOST_COPYING)


class CopyThreads:
    """A few threads beside the caller's, started as they are needed; a forked child makes its own.

    Attributes:
        most: threads that work at once, the caller's included.
        bytes_a_thread: one thread more for every so many.
    """

    def __init__(self, most: int | None = None, bytes_a_thread: int | None = None) -> None:
        """Start none yet; by default as many as copying on this machine takes."""
        self.most = most or copying_threads()
        self.bytes_a_thread = bytes_a_thread or BYTES_A_THREAD
        self._process, self._pool = os.getpid(), self._new_pool()

    def count_for(self, num_bytes: int) -> int:
        """Return how many threads copying so much pays for."""
        return max(1, min(self.most, num_bytes // self.bytes_a_thread))

    def take(self, source: Array, places: Int64, out: Array) -> None:
        """Copy the rows of `source` at `places` (int64 [N], all of them there) into `out` [N, ...].

        As many threads work at it as its bytes pay for.
        """

        def copy(part: slice) -> None:
            # mode="raise" would gather into memory of its own first, at half the speed.
            np.take(source, places[part], axis=0, out=out[part], mode="clip")

        if out.nbytes < 2 * self.bytes_a_thread:
            copy(slice(None))
        else:
            self.share(len(out), out.nbytes, copy)

    def share(
        self,
        num_records: int,
        num_bytes: int,
        work: Callable[[slice], None],
        most_a_part: int | None = None,
    ) -> None:
        """Do `work` over all records, in parts that as many threads share as the bytes pay for."""
        num_threads = self.count_for(num_bytes)
        size = max(1, -(-num_records // num_threads))
        parts = iter([*even_parts(num_records, min(size, most_a_part or size))])

        def work_on_parts() -> None:
            for part in parts:  # every thread takes the next that none has taken
                work(part)

        self.run(work_on_parts, num_threads)

    def run(self, work: Callable[[], None], num_threads: int) -> None:
        """Run the same `work` on the calling thread and on others beside it; wait for all.

        A thread that has not begun when the caller is through is called off: what is to be done
        must come from something that all take from. The system may give fewer threads.

        Raises:
            BaseException: what any of them raised.
        """
        helpers: list[Future[None]] = []
        with suppress(RuntimeError):  # the system or a closing interpreter gives no threads
            for _ in range(num_threads - 1):
                helpers.append(self._own_pool().submit(work))
        try:
            work()
        finally:  # nobody may write into the caller's buffers after this
            errors = [None if helper.cancel() else helper.exception() for helper in helpers]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """Let the threads end; waits for none."""
        self._own_pool().shutdown(wait=False)

    def _own_pool(self) -> ThreadPoolExecutor:
        if self._process != os.getpid():  # the parent's threads are not here
            self._process, self._pool = os.getpid(), self._new_pool()
        return self._pool

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max(1, self.most - 1), "edje-read")
