"""Locks between processes and threads: `flock` on a file that says who holds it."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
# ENOSYS: Lustre without `-o flock`; ENOLCK: NFS 3 without its lock service; the others: FUSE.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
LOCKS_HINT = (
    "use a file system with locks: a local disk, NFS 4, or Lustre mounted with -o flock "
    "(its administrator can do that)"
)


def open_lock(path: Path) -> int:
    """Open a lock file, made if there is none; return its descriptor, the caller's to close.

    Closing it, or the end of the process however it ends, lets go of the lock.

    Raises:
        OSError: the file cannot be opened for writing.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def try_lock(descriptor: int) -> str | None:
    """Take the lock and return None, or return in words who holds it.

    Raises:
        OSError: it can be neither taken nor found taken: see `lock_fault`.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        return os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
    _sign(descriptor)
    return None


def wait_lock(descriptor: int) -> None:
    """Take the lock, as soon as whoever holds it lets go.

    Raises:
        OSError: it cannot be taken: see `lock_fault`.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    _sign(descriptor)


def lock_fault(path: Path, error: OSError) -> str:
    """Return in words why `path` could not be locked; `LOCKS_HINT` says what to do."""
    if error.errno in _NO_LOCKS:
        return f"cannot lock {path}: its file system offers no locks ({error.strerror})"
    return f"cannot lock {path}: {error.strerror or error}"


def _sign(descriptor: int) -> None:
    with suppress(OSError):  # a courtesy to whoever finds the lock taken
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
