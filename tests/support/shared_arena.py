"""Memory that two processes have at the same addresses, with guard bands around every array.

An address stored in it, or passed to the other process as a number, is real on both sides.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

NUM_BYTES = 4 << 30  # of addresses; what nobody writes takes no memory
FIRST, STEP, TRIES = 0x2000_0000_0000, 1 << 36, 64  # where systems put nothing of their own
BAND = 1 << 16  # bytes before and after every array
ALIGNED = 256  # as the driver's own allocations
# NaN in every float and absurd in every integer: what a kernel reads beside an array shows.
MARK = b"\xa5\xff" * (BAND // 2 + 1)
PROT_READ_WRITE, MAP_SHARED, MAP_NORESERVE, MAP_FIXED_NOREPLACE = 3, 0x1, 0x4000, 0x100000


def map_at(file: int, address: int) -> None:
    """Map the file's first `NUM_BYTES` at `address`; they stay until the process ends.

    Raises:
        OSError: something lies there.
    """
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
    )
    flags = MAP_SHARED | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    found = library.mmap(address, NUM_BYTES, PROT_READ_WRITE, flags, file, 0)
    if found != address:  # systems before 4.17 take the address as a wish
        raise OSError(ctypes.get_errno(), f"no memory can be mapped at {address:#x}")


def free_addresses() -> Iterator[int]:
    """Yield where an arena may lie; whoever maps it finds out."""
    return iter(range(FIRST, FIRST + STEP * TRIES, STEP))


@dataclass(frozen=True, slots=True)
class Block:
    """One array's bytes in an arena, between two bands."""

    name: str
    address: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.address + self.num_bytes

    def content(self) -> Any:
        """Return its bytes; no copy."""
        return (ctypes.c_uint8 * self.num_bytes).from_address(self.address)


class Arena:
    """Shared memory and who has which part of it. Any thread may allocate."""

    def __init__(self, address: int):
        """Map new memory.

        Raises:
            OSError: `address` is taken.
        """
        self.file, self.address = os.memfd_create("arena"), address
        self._lock = threading.Lock()
        self._blocks: list[Block] = []  # in order
        self._freed: deque[int] = deque()  # a finalizer may run anywhere, the lock's holder too
        self._mark = ctypes.create_string_buffer(MARK, len(MARK))
        self._compare = ctypes.CDLL(None).memcmp
        self._compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        try:
            os.ftruncate(self.file, NUM_BYTES)
            map_at(self.file, address)
        except OSError:
            self.close()
            raise

    @property
    def path(self) -> str:
        """Where another process opens the memory's file."""
        return f"/proc/{os.getpid()}/fd/{self.file}"

    def array(self, num_elements: int, dtype: Any, name: str = "an array") -> np.ndarray:
        """Return new memory, its values undefined; free when the last view of it has gone."""
        dtype = np.dtype(dtype)
        num_bytes = num_elements * dtype.itemsize
        if not num_bytes:
            return np.empty(0, dtype)
        with self._lock:
            block = self._place(name, num_bytes)
            for band in _bands(block):
                ctypes.memmove(band, self._mark_for(band), BAND)
        memory = block.content()
        weakref.finalize(memory, self._freed.append, block.address)
        return np.frombuffer(memory, np.uint8).view(dtype)

    def block_at(self, address: int) -> Block | None:
        """Return the array that this address lies in."""
        with self._lock:
            place = bisect_right(self._blocks, address, key=attrgetter("address"))
            block = self._blocks[place - 1] if place else None
        return block if block is not None and address < block.end else None

    def written_beside(self) -> list[str]:
        """Return the names of arrays beside which somebody wrote; the bands are put back."""
        with self._lock:
            return [block.name for block in self._blocks if self._is_damaged(block)]

    def close(self) -> None:
        """Close the file; arrays stay as long as anybody has them."""
        os.close(self.file)

    def _place(self, name: str, num_bytes: int) -> Block:
        """Take the first gap that is large enough."""
        while self._freed:
            address = self._freed.popleft()
            place = bisect_right(self._blocks, address, key=attrgetter("address")) - 1
            del self._blocks[place]
        start = self.address
        for block in self._blocks:
            if start + 2 * BAND + num_bytes <= block.address - BAND:
                break
            start = -(-(block.end + BAND) // ALIGNED) * ALIGNED
        new = Block(name, start + BAND, num_bytes)
        if new.end + BAND > self.address + NUM_BYTES:
            raise MemoryError(f"the arena has no {num_bytes:,} bytes for {name}")
        insort(self._blocks, new, key=attrgetter("address"))
        return new

    def _is_damaged(self, block: Block) -> bool:
        damaged = [
            band for band in _bands(block) if self._compare(band, self._mark_for(band), BAND)
        ]
        for band in damaged:
            ctypes.memmove(band, self._mark_for(band), BAND)
        return bool(damaged)

    def _mark_for(self, address: int) -> int:
        """Return where the pattern lies that starts as memory at `address` does."""
        return ctypes.addressof(self._mark) + address % 2


def _bands(block: Block) -> tuple[int, int]:
    """Return where the two bands start."""
    return block.address - BAND, block.end
