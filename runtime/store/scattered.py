"""Read many places of files in one call, without the GIL: kernel AIO, where Linux offers it.

A loop of `preadv` needs the GIL again after every read, and a thread that hashes keeps it; this
needs it once. Of a file opened without O_DIRECT all is read when the call returns.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from errno import EINTR, ENOSYS
from functools import cache, partial
from typing import Any

import numpy as np

from ...arrays import Array, Int64

# Reads that one call takes, and queues of a process. The system allows 65,536 reads for all
# processes together (fs.aio-max-nr), and takes 40 ms to close a queue: ours stay open.
MOST_READS, MOST_QUEUES = 128, 16
# io_setup, io_destroy, io_getevents, io_submit; on other machines nobody knows their numbers.
GENERIC = (0, 1, 4, 2)
NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": GENERIC, "riscv64": GENERIC}
# linux/aio_abi.h: a struct iocb, whose other fields are 0 when it reads, and an io_event.
IOCB = np.dtype("V20, i4, i8, i8, i8, V16")
IOCB.names = ("before", "file", "address", "size", "offset", "behind")
EVENT = np.dtype("V16, i8, V8")
EVENT.names = ("before", "result", "behind")


def read_places(files: Sequence[int], addresses: Int64, num_bytes: int, offsets: Int64) -> bool:
    """Read `num_bytes` of each of `files` [N] from `offsets` [N] to `addresses` [N] in memory.

    Returns:
        Whether all came whole. If not, something is wrong with a file, or the system gives no
        queue, or all are in use: read one by one.
    """
    try:
        queue = _idle.pop()  # in one step, so that two threads never get the same
    except IndexError:
        return False
    try:
        queue = queue or _Queue()
        for at in range(0, len(files), MOST_READS):
            part = slice(at, at + MOST_READS)
            if not queue.read(files[part], addresses[part], num_bytes, offsets[part]):
                return False
        return True
    except OSError:
        return False
    finally:
        _idle.append(queue if queue and queue.is_open else None)


@cache
def is_offered() -> bool:
    """Whether this system lets this process read so."""
    nothing = np.empty(0, np.int64)
    return read_places((), nothing, 0, nothing)


def address(array: Array) -> int:
    """Return where an array begins in memory."""
    return int(array.__array_interface__["data"][0])


class _Queue:
    """A queue of the kernel's, for one thread at a time.

    Raises:
        OSError: there is none: ENOSYS, EPERM (a sandbox), EAGAIN (fs.aio-max-nr is reached).
    """

    def __init__(self) -> None:
        setup, self._destroy, self._getevents, self._submit, self._peek = _calls()
        self._iocbs, self._events = np.zeros(MOST_READS, IOCB), np.zeros(MOST_READS, EVENT)
        first = address(self._iocbs)
        self._pointers = np.arange(first, first + self._iocbs.nbytes, IOCB.itemsize)
        self._at = (address(self._pointers), address(self._events))
        context = ctypes.c_ulong(0)
        if setup(MOST_READS, ctypes.addressof(context)) < 0:
            raise OSError(ctypes.get_errno(), "io_setup")
        self._context, self.is_open = context.value, True

    def read(self, files: Sequence[int], addresses: Int64, num_bytes: int, offsets: Int64) -> bool:
        """As `read_places`, `MOST_READS` at most."""
        iocbs, results = self._iocbs[: len(files)], self._events["result"]
        pointers, events = self._at
        iocbs["file"], iocbs["address"], iocbs["offset"] = files, addresses, offsets
        iocbs["size"] = num_bytes
        try:
            pending: int = max(0, self._submit(self._context, len(files), pointers))
            are_whole: bool = pending == len(files)
            get, least = self._peek, 0  # keeps the GIL: as nearly always, everything is there
            while pending:
                done = get(self._context, least, pending, events, None)
                get, least = self._getevents, 1
                if done > 0:
                    pending -= done
                    are_whole &= bool((results[:done] == num_bytes).all())
                elif done < 0 and ctypes.get_errno() != EINTR:
                    raise OSError(ctypes.get_errno(), "io_getevents")
        except BaseException:  # nobody may write into the caller's memory after this
            self.is_open = False
            self._destroy(self._context)  # waits
            raise
        return are_whole


@cache
def _calls() -> tuple[Any, ...]:
    """Return io_setup, io_destroy, io_getevents, io_submit, and io_getevents that keeps the GIL.

    Raises:
        OSError: nobody knows them here.
    """
    numbers = NUMBERS.get(os.uname().machine)
    if numbers is None or sys.platform != "linux" or sys.maxsize < 1 << 32:
        raise OSError(ENOSYS, "io_setup")
    number, pointer, queue = ctypes.c_long, ctypes.c_void_p, ctypes.c_ulong
    setup, destroy = (ctypes.c_uint, pointer), (queue,)
    getevents, submit = (queue, number, number, pointer, pointer), (queue, number, pointer)
    types: tuple[tuple[Any, ...], ...] = (setup, destroy, getevents, submit)
    calls = []
    for library, at in (*((ctypes.CDLL, at) for at in range(4)), (ctypes.PyDLL, 2)):
        call = library(None, use_errno=True)["syscall"]
        call.argtypes, call.restype = (number, *types[at]), number
        calls.append(partial(call, numbers[at]))
    return tuple(calls)


_idle: list[_Queue | None] = []


def _have_none() -> None:
    """Begin without queues; a forked child has none of its parent's."""
    _idle[:] = [None] * MOST_QUEUES


_have_none()
os.register_at_fork(after_in_child=_have_none)
