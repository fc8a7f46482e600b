"""Every change a store makes to files of its own (SQLite writes the catalog itself).

In one place, so that a test can record these calls and play a power loss after any of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ...files import sync_folder as _sync_folder


def create(path: Path) -> int:
    """Make a file anew and return its descriptor, open for writing.

    A file of that name is unlinked, never cut: it may be linked elsewhere, or be read.
    """
    unlink(path)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def open_write(path: Path) -> int:
    """Open an existing file for writing; return its descriptor."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def write(descriptor: int, pieces: Sequence[memoryview | bytes], offset: int) -> None:
    """Write at most 1,024 `pieces` one after the other from `offset` on, however short calls fall.

    Raises:
        OSError: the disk is full, or broken; any part may have been written.
    """
    written = os.pwritev(descriptor, pieces, offset)
    total = sum(map(len, pieces))
    if written == total:
        return
    rest = memoryview(b"".join(pieces))
    while written < total:
        written += os.pwrite(descriptor, rest[written:], offset + written)


def sync(descriptor: int) -> None:
    """Return when everything written to the file, and its size, is on disk."""
    os.fdatasync(descriptor)


def truncate(path: Path, size: int) -> None:
    """Cut a file to `size` bytes."""
    os.truncate(path, size)


def unlink(path: Path) -> None:
    """Remove a name, if it is there."""
    path.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Give a file a second name."""
    os.link(source, target)


def rename(source: Path, target: Path) -> None:
    """Rename a file; a file called `target` is replaced."""
    os.replace(source, target)


def sync_folder(folder: Path) -> None:
    """Return when the names in `folder` are on disk."""
    _sync_folder(folder)
