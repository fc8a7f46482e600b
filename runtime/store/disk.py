"""A store's folder on disk: each change to its files, its locks, how it is made, what it takes.

Every change that a store makes to files of its own is a function here (SQLite writes the catalog
itself), so that a test can record these calls and play a power loss after any of them.

Locks are the kernel's: they end with the process however it ends. The one writer holds
`writer.lock` (flock). A reader at generation g holds a shared lock on byte g of `readers.lock`
(an open file description lock, which needs no write access): a file that generation g no longer
needs may go once nobody holds a byte below g.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import EdjeError, StoreError
from ...files import LOCKS_HINT, Closing, is_free, lock_fault, open_lock, publish_folder, try_lock
from ...files import sync_folder as sync_folder
from .catalog import Catalog, CatalogState, sqlite_errors
from .format import INCOMING, LOCK, READERS, SEGMENTS, STORE_JSON, StoreLayout, segment_name

truncate, link, rename = os.truncate, os.link, os.replace


@contextmanager
def closed_after(descriptor: int) -> Iterator[int]:
    """Close a descriptor when the block ends."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


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


def unlink(path: Path) -> None:
    """Remove a name, if it is there."""
    path.unlink(missing_ok=True)


# type, whence, start, length, pid; `0q` pads as C does
_FLOCK = struct.Struct("@hhqqi0q")
_ALL = 1 << 62


class Lock(Closing):
    """A lock that is held until `close`; of no file where nobody can write and none is needed."""

    def __init__(self, descriptor: int | None = None):
        self._descriptor = descriptor

    def keep(self, generation: int) -> None:
        """Of the generations that a reader holds, let go of all but this one."""
        if self._descriptor is not None:
            for start, length in ((0, generation), (generation + 1, _ALL - generation - 1)):
                if length:
                    lock = _range_lock(fcntl.F_UNLCK, start, length)
                    fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, lock)

    def close(self) -> None:
        """Let go. Calling it twice is allowed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_writer(folder: Path) -> Lock:
    """Become the writer of a store.

    Raises:
        StoreError: another writer holds the lock, the folder cannot be written, or its file system
            offers no locks.
    """
    try:
        descriptor = open_lock(folder / LOCK)
    except OSError as error:
        raise StoreError(
            f"cannot write the store {folder}: {error.strerror}",
            hint='make the folder writable, or open the store with mode="r"',
        ) from error
    try:
        owner = try_lock(descriptor)
    except OSError as error:
        os.close(descriptor)
        raise StoreError(lock_fault(folder / LOCK, error), hint=LOCKS_HINT) from error
    if owner is not None:
        os.close(descriptor)
        raise StoreError(
            f"the store {folder} has a writer already ({owner}); a store takes one at a time",
            hint="wait until it has finished; readers need not wait",
        )
    return Lock(descriptor)


def lock_reader(folder: Path) -> Lock:
    """Hold every generation of a store, until `keep` says which one it is.

    Raises:
        StoreError: the lock file cannot be opened, or the file system offers no locks.
    """
    path, flags = folder / READERS, os.O_RDONLY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        try:
            descriptor = os.open(path, flags | os.O_CREAT, 0o666)
        except OSError:  # it is gone and nobody could make it, so nobody can write
            return Lock()
    except OSError as error:
        raise StoreError(f"cannot open {path}: {error.strerror}") from error
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _range_lock(fcntl.F_RDLCK, 0, _ALL))
    except OSError as error:
        os.close(descriptor)
        raise StoreError(lock_fault(path, error), hint=LOCKS_HINT) from error
    return Lock(descriptor)


def is_read_before(folder: Path, generation: int) -> bool:
    """Return whether a reader holds a generation before `generation`.

    Raises:
        OSError: the lock file cannot be used.
    """
    if generation <= 0:
        return False
    with closed_after(open_lock(folder / READERS)) as descriptor:
        wanted = _range_lock(fcntl.F_WRLCK, 0, generation)
        found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, wanted)
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def _range_lock(kind: int, start: int, length: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)


NEW_FOLDER = "choose a new or an empty folder for the store"


def create_folder(folder: Path, layout: StoreLayout) -> None:
    """Write the files of an empty store, whole or not at all.

    Raises:
        StoreError: sizes that no store can have; `folder` is there and not empty, or cannot be
            written.
    """
    faults = layout.faults()
    if faults:
        raise StoreError(f"cannot make a token store at {folder}", faults=faults)
    try:
        if not is_free(folder):
            there = (folder / STORE_JSON).exists()
            raise StoreError(
                f"{folder} exists already and is left as it was",
                hint='open the store there with mode="a"' if there else NEW_FOLDER,
            )
        with publish_folder(folder, manifest=STORE_JSON) as staging:
            (staging / STORE_JSON).write_bytes(layout.to_bytes())
            (staging / SEGMENTS).mkdir()
            (staging / INCOMING).mkdir()
            (staging / LOCK).touch()
            (staging / READERS).touch()
            _make_catalog(staging, folder, layout)
    except StoreError:
        raise
    except EdjeError as error:
        raise StoreError(error.message, hint=NEW_FOLDER) from error
    except OSError as error:
        raise StoreError(f"cannot make a token store at {folder}: {error.strerror}") from error


def _make_catalog(staging: Path, folder: Path, layout: StoreLayout) -> None:
    """Make the catalog, and open it once: a store that cannot be written is not published."""
    try:
        with sqlite_errors(staging):
            Catalog.create(staging, layout.to_bytes())
        with lock_writer(staging):
            Catalog.open(staging, writable=True).close()
    except StoreError as error:
        message = error.message.replace(str(staging), str(folder))
        raise StoreError(message, hint=error.hint) from error


@dataclass(frozen=True, slots=True)
class StoreStat:
    """What a store holds.

    Attributes:
        num_records: live ones; `num_deleted` others still take space until `compact`.
        total_bytes: on disk, of every file in the folder.
        record_bytes: tokens of one image; `scale_bytes` more for int8.
        faults: what opening found damaged in the catalog, in words.
    """

    path: str
    num_records: int
    num_deleted: int
    num_segments: int
    num_retired: int
    total_bytes: int
    record_bytes: int
    scale_bytes: int
    num_tokens: int
    hidden: int
    dtype: str
    fingerprint_encoder: str
    generation: int
    format_version: int
    created_by: str
    faults: tuple[str, ...]


def stat_of(
    folder: Path, layout: StoreLayout, state: CatalogState, faults: Sequence[str]
) -> StoreStat:
    """Return what the store at `folder` holds."""
    num_rows = sum(info.num_rows for info in state.segments.values())
    return StoreStat(
        path=str(folder),
        num_records=num_rows - len(state.deleted),
        num_deleted=len(state.deleted),
        num_segments=len(state.segments),
        num_retired=len(state.retired),
        total_bytes=disk_bytes(folder),
        record_bytes=layout.record_bytes,
        scale_bytes=layout.scale_bytes,
        num_tokens=layout.num_tokens,
        hidden=layout.hidden,
        dtype=layout.dtype,
        fingerprint_encoder=layout.fingerprint_encoder,
        generation=state.generation,
        format_version=layout.format_version,
        created_by=layout.created_by,
        faults=tuple(faults),
    )


def disk_bytes(folder: Path) -> int:
    """Return what the files and folders in a store's folder take on disk, as `du` counts it.

    Raises:
        StoreError: the folder cannot be read.
    """
    try:
        return _blocks_of(folder.rglob("*"))
    except OSError as error:
        raise StoreError(
            f"cannot measure the store {folder}: {error.strerror or error}; no record is lost"
        ) from error


def waiting_bytes(folder: Path, state: CatalogState) -> int:
    """Return what the files take on disk that only readers of older generations need."""
    return _blocks_of(folder / SEGMENTS / segment_name(segment) for segment in state.retired)


def _blocks_of(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):  # SQLite removes its log when the writer closes
            total += path.stat().st_blocks * 512
    return total
