"""Many reads in one system call: Linux kernel AIO, or `preadv` one by one where it is not offered.

Kernel AIO is called through `ctypes`, which lets go of the GIL. A read through the page cache is
done when the call returns; reads of files opened with O_DIRECT run side by side in the device.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from errno import EINTR, ENOSYS
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import StoreError

# Most reads a queue takes at once. The system allows 65,536 (fs.aio-max-nr) for all processes.
QUEUE_DEPTH = 128

# struct iocb, io_event (linux/aio_abi.h) and iovec, as 64-bit little-endian machines lay them out.
READ = np.dtype(
    [
        ("num_bytes", "<i8"),  # the caller's, handed back in the event
        ("key", "<u4"),
        ("rw_flags", "<u4"),
        ("opcode", "<u2"),
        ("priority", "<i2"),
        ("descriptor", "<i4"),
        ("pieces", "<u8"),  # address of its first iovec
        ("num_pieces", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("event_descriptor", "<u4"),
    ]
)
EVENT = np.dtype([("wanted", "<i8"), ("read", "<u8"), ("result", "<i8"), ("result2", "<i8")])
PIECE = np.dtype([("address", "<u8"), ("num_bytes", "<u8")])
OPCODE_PREADV = 7

# io_setup, io_destroy, io_getevents, io_submit.
_X86_64 = (206, 207, 208, 209)
_GENERIC = (0, 1, 4, 2)  # of the architectures that Linux took up after 2010
SYSTEM_CALLS = {
    "x86_64": _X86_64,
    "aarch64": _GENERIC,
    "riscv64": _GENERIC,
    "loongarch64": _GENERIC,
}


class ReadBatch:
    """Reads in the form the kernel takes them; keeps alive what they point to, but for the files.

    Attributes:
        reads: `READ` [N]: `num_bytes` is what a read must give, `pieces` points into `pieces`.
        pieces: `PIECE` [M]: address and length of every part of every destination.
        address, pieces_address: where they lie.
        pointers: the address of N addresses, one a read.
    """

    def __init__(self, num_reads: int, num_pieces: int):
        sizes = num_reads * READ.itemsize, num_pieces * PIECE.itemsize, num_reads * 8
        pieces, pointers = sizes[0], sizes[0] + sizes[1]
        memory = np.zeros(sum(sizes), np.uint8)  # one piece: this is done for every gather
        self.reads = memory[:pieces].view(READ)
        self.pieces = memory[pieces:pointers].view(PIECE)
        self.address = address(memory)
        self.pieces_address, self.pointers = self.address + pieces, self.address + pointers
        self.reads["opcode"] = OPCODE_PREADV
        memory[pointers:].view(np.int64)[:] = np.arange(
            self.address, self.pieces_address, READ.itemsize
        )


class ReadQueue(Protocol):
    """Carries out reads; used by one thread at a time."""

    way: str

    def read(self, batch: ReadBatch, start: int, stop: int) -> list[int]:
        """Carry out reads [start, stop) of `batch`, at most `QUEUE_DEPTH`.

        Returns:
            Those that gave an error, or less than they must: reading again tells what is wrong.
        """

    def close(self) -> None:
        """Give the queue's resources back. Calling it twice is allowed."""


class KernelQueue:
    """A queue of kernel AIO. Belongs to the process that made it: a forked child has none."""

    way = "kernel AIO"

    def __init__(self, depth: int = QUEUE_DEPTH):
        """Ask the kernel for a queue.

        Raises:
            OSError: it offers none: ENOSYS (nor any on this machine), EPERM (a sandbox), EAGAIN
                (all that fs.aio-max-nr allows are taken).
        """
        self._calls = _system_calls()
        context = ctypes.c_ulong(0)
        if self._calls.setup(depth, ctypes.addressof(context)) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._context = context.value
        memory = np.zeros(depth * EVENT.itemsize, np.uint8)
        events = memory.view(EVENT)
        self._wanted, self._results = events["wanted"], events["result"]
        self._reads, self._events = events["read"], address(memory)

    def read(self, batch: ReadBatch, start: int, stop: int) -> list[int]:
        """See `ReadQueue.read`."""
        try:
            return self._read(batch, start, stop)
        except BaseException:  # a KeyboardInterrupt between two calls, too
            self.close()
            raise

    def close(self) -> None:
        """Wait until no read is under way any more, and give the queue back."""
        context, self._context = self._context, 0
        if context:
            self._calls.destroy(context)

    def _read(self, batch: ReadBatch, start: int, stop: int) -> list[int]:
        failed, num_pending = [], 0
        while start < stop:
            taken = self._calls.submit(self._context, stop - start, batch.pointers + 8 * start)
            if taken > 0:
                start += taken
                num_pending += taken
            else:  # the first is refused
                failed.append(start)
                start += 1
        while num_pending:
            found = self._calls.getevents(
                self._context, num_pending, num_pending, self._events, None
            )
            if found > 0:
                num_pending -= found
                failed += self._failed(batch, found)
            elif ctypes.get_errno() != EINTR:
                reason = os.strerror(ctypes.get_errno())
                raise StoreError(f"cannot wait for reads that are under way: {reason}")
        return failed

    def _failed(self, batch: ReadBatch, num_events: int) -> list[int]:
        """Return which of the first events tell of reads that did not give what they must."""
        missed = self._results[:num_events] != self._wanted[:num_events]
        if not missed.any():
            return []
        reads = self._reads[:num_events][missed] - batch.address
        return [int(read) // READ.itemsize for read in reads]


class PreadvQueue:
    """The same reads, one system call each."""

    way = "preadv"

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._preadv = libc["preadv64" if hasattr(libc, "preadv64") else "preadv"]
        self._preadv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
        self._preadv.restype = ctypes.c_ssize_t

    def read(self, batch: ReadBatch, start: int, stop: int) -> list[int]:
        """See `ReadQueue.read`."""
        reads = batch.reads[start:stop]
        columns = ("descriptor", "pieces", "num_pieces", "offset")
        given = list(map(self._preadv, *(reads[name].tolist() for name in columns)))
        wanted = reads["num_bytes"].tolist()
        return [start + at for at in range(len(reads)) if given[at] != wanted[at]]

    def close(self) -> None:
        """See `ReadQueue.close`: there is nothing to give back."""


def open_queue() -> ReadQueue:
    """Return a queue of kernel AIO, or of `preadv` where the system offers no other."""
    try:
        return KernelQueue()
    except OSError:
        return PreadvQueue()


def address(array: npt.NDArray[Any]) -> int:
    """Return where the first value lies; quick only for plain numbers."""
    return int(array.__array_interface__["data"][0])


@dataclass(frozen=True, slots=True)
class _SystemCalls:
    setup: Any
    destroy: Any
    getevents: Any
    submit: Any


def _system_calls() -> _SystemCalls:
    """Return the four calls of kernel AIO on this machine, or raise ENOSYS."""
    numbers = SYSTEM_CALLS.get(os.uname().machine)
    usable = sys.platform == "linux" and sys.maxsize > 1 << 32 and sys.byteorder == "little"
    if numbers is None or not usable:
        raise OSError(ENOSYS, os.strerror(ENOSYS))
    libc = ctypes.CDLL(None, use_errno=True)
    call = partial(_system_call, libc)
    long, pointer = ctypes.c_long, ctypes.c_void_p
    setup, destroy, getevents, submit = numbers
    return _SystemCalls(
        setup=call(setup, ctypes.c_uint, pointer),
        destroy=call(destroy, ctypes.c_ulong),
        getevents=call(getevents, ctypes.c_ulong, long, long, pointer, pointer),
        submit=call(submit, ctypes.c_ulong, long, pointer),
    )


def _system_call(libc: ctypes.CDLL, number: int, *types: Any) -> Any:
    function = libc["syscall"]  # by this way a new object each time, with types of its own
    function.argtypes = (ctypes.c_long, *types)
    function.restype = ctypes.c_long
    return partial(function, number)
