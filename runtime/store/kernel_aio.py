"""Many reads in one system call: Linux kernel AIO, or `pread` one by one where it is not offered.

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
# Of stores that were closed, kept for the next ones.
MAX_IDLE_QUEUES = 16

# A read is a struct iocb (linux/aio_abi.h): eight 64-bit words, of which these are not zero. The
# operation, in the low half of FILE, is 0 (IOCB_CMD_PREAD); the descriptor is the high half.
READ_WORDS = 8
WANTED, FILE, ADDRESS, NUM_BYTES, OFFSET = 0, 2, 3, 4, 5
FILE_BITS = 32
# A struct io_event: WANTED as the read had it, the address of the read, and what came of it.
EVENT_WORDS = 4
READ, RESULT = 1, 2

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
    """Reads in the form the kernel takes them. Their files and destinations are the caller's.

    Attributes:
        reads: int64 [N, 8]; WANTED and NUM_BYTES are equal.
        address: where they lie.
        pointers: the address of N addresses, one a read.
    """

    def __init__(self, num_reads: int):
        memory = np.zeros(num_reads * (READ_WORDS + 1), np.int64)
        self.reads = memory[: num_reads * READ_WORDS].reshape(num_reads, READ_WORDS)
        self.address = address(memory)
        self.pointers = stop = self.address + self.reads.nbytes
        memory[num_reads * READ_WORDS :] = np.arange(self.address, stop, READ_WORDS * 8)


class ReadQueue(Protocol):
    """Carries out reads; used by one thread at a time."""

    way: str

    def read(self, batch: ReadBatch, start: int, stop: int) -> list[int]:
        """Carry out reads [start, stop) of `batch`, at most `QUEUE_DEPTH`.

        Returns:
            Those that gave an error, or less than they must: reading again tells what is wrong.
        """

    def close(self) -> None:
        """Wait until no read is under way, and give all back. Calling it twice is allowed."""

    def give_back(self) -> None:
        """Be done with it: nothing is under way, and the next who opens a queue may have it."""


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
        self._events = np.zeros((depth, EVENT_WORDS), np.int64)
        self._events_address = address(self._events)

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

    def give_back(self) -> None:
        """See `ReadQueue.give_back`."""
        if not (self._context and _idle_queues.keep(self)):
            self.close()

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
                self._context, num_pending, num_pending, self._events_address, None
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
        events = self._events[:num_events]
        missed = events[:, RESULT] != events[:, WANTED]
        if not missed.any():
            return []
        places: list[int] = ((events[missed, READ] - batch.address) // (READ_WORDS * 8)).tolist()
        return places


class PreadQueue:
    """The same reads, one system call each."""

    way = "pread"

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._pread = libc["pread64" if hasattr(libc, "pread64") else "pread"]
        number = ctypes.c_int64
        self._pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, number)
        self._pread.restype = ctypes.c_ssize_t

    def read(self, batch: ReadBatch, start: int, stop: int) -> list[int]:
        """See `ReadQueue.read`."""
        reads = batch.reads[start:stop]
        columns = (reads[:, FILE] >> FILE_BITS, *(reads[:, ADDRESS : OFFSET + 1].T))
        given = list(map(self._pread, *(column.tolist() for column in columns)))
        wanted = reads[:, WANTED].tolist()
        return [start + at for at in range(len(reads)) if given[at] != wanted[at]]

    def close(self) -> None:
        """See `ReadQueue.close`: there is nothing to close."""

    def give_back(self) -> None:
        """See `ReadQueue.give_back`: there is nothing to keep."""


class _IdleQueues:
    """Queues of this process that nobody reads with: the kernel takes 40 ms to close one."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._queues: list[KernelQueue] = []

    def keep(self, queue: KernelQueue) -> bool:
        """Keep a queue for the next who wants one; False if there are enough."""
        self._forget_parent()
        if len(self._queues) >= MAX_IDLE_QUEUES:
            return False
        self._queues.append(queue)
        return True

    def take(self) -> KernelQueue | None:
        """Return a queue that is now the caller's, if there is one."""
        self._forget_parent()
        try:
            return self._queues.pop()  # in one step, so that two threads never get the same
        except IndexError:
            return None

    def _forget_parent(self) -> None:
        """Drop queues that a forked child sees but does not have."""
        if self._process != os.getpid():
            self._process, self._queues = os.getpid(), []


_idle_queues = _IdleQueues()


def open_queue() -> ReadQueue:
    """Return a queue of kernel AIO, or of `pread` where the system offers no other."""
    try:
        return _idle_queues.take() or KernelQueue()
    except OSError:
        return PreadQueue()


def address(array: npt.NDArray[Any]) -> int:
    """Return where the array's first value lies."""
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
