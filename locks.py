"""Locks between processes and threads: `flock` on a file that says who holds it."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def open_lock(path: Path) -> int:
    """Open a lock file, made if there is none; return its descriptor, the caller's to close.

    Closing it, or the end of the process however it ends, lets go of the lock.

    Raises:
        OSError: the file cannot be opened for writing.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def try_lock(descriptor: int) -> str | None:
    """Take the lock and return None, or return in words who holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
    _sign(descriptor)
    return None


def wait_lock(descriptor: int) -> None:
    """Take the lock, as soon as whoever holds it lets go."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    _sign(descriptor)


def _sign(descriptor: int) -> None:
    with suppress(OSError):  # a courtesy to whoever finds the lock taken
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
