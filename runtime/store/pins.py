"""Which generations readers still use: a byte of `readers.lock` for each, locked while it is read.

A reader at generation g holds a shared lock on byte g. A file that generation g no longer needs may
go once nobody holds a byte below g. The locks are the kernel's (open file description locks), so
they end with the process however it ends, and need no write access.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from ...errors import StoreError
from ...files import LOCKS_HINT, lock_fault
from .format import READERS

# type, whence, start, length, pid; `0q` pads as C does
_FLOCK = struct.Struct("@hhqqi0q")
_ALL = 1 << 62


class Pin:
    """A reader's hold on one generation: `take` it, narrow it with `keep`, end it with `close`."""

    def __init__(self, descriptor: int | None):
        self._descriptor = descriptor

    @classmethod
    def take(cls, folder: Path) -> Pin:
        """Hold every generation, until `keep` says which one it is.

        Raises:
            StoreError: the file system gives no locks.
        """
        descriptor = _open(folder)
        if descriptor is None:
            return cls(None)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, 0, _ALL))
        except OSError as error:
            os.close(descriptor)
            raise StoreError(lock_fault(folder / READERS, error), hint=LOCKS_HINT) from error
        return cls(descriptor)

    def keep(self, generation: int) -> None:
        """Let go of all generations but this one."""
        if self._descriptor is not None:
            for start, length in ((0, generation), (generation + 1, _ALL - generation - 1)):
                if length:
                    lock = _lock(fcntl.F_UNLCK, start, length)
                    fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, lock)

    def close(self) -> None:
        """Let go. Calling it twice is allowed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def is_pinned_before(folder: Path, generation: int) -> bool:
    """Return whether a reader holds a generation before `generation`.

    Raises:
        OSError: the lock file cannot be used.
    """
    if generation <= 0:
        return False
    descriptor = os.open(folder / READERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        wanted = _lock(fcntl.F_WRLCK, 0, generation)
        found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, wanted)
    finally:
        os.close(descriptor)
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _open(folder: Path) -> int | None:
    """Open the lock file; None where it is gone and nobody could make it, so nobody can write."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(folder / READERS, flags)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StoreError(f"cannot open {folder / READERS}: {error.strerror}") from error
    try:
        return os.open(folder / READERS, flags | os.O_CREAT, 0o666)
    except OSError:
        return None


def _lock(kind: int, start: int, length: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
