"""Files and folders: hashes, what is written whole or not at all, locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from .errors import EdjeError

_CHUNK_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hex.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


Opened = TypeVar("Opened", bound="Closing")


class Closing(ABC):
    """Makes a context manager of whatever has `close`."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> object:
        """Give back what is held."""

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextmanager
def rewrite_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file that takes the place of `path`, with its mode, when the block ends well.

    It is durable then. Whoever reads `path` finds all of the old file or all of the new one.

    Raises:
        OSError: it cannot be written; `path` stays as it was.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


PARTIAL = ".edje-partial-"  # begins the names of what is not published yet, inside a target
LOST_AND_FOUND = "lost+found"  # in the root of every ext file system
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MOUNTS = Path("/proc/self/mountinfo")


@contextmanager
def publish_folder(target: Path, *, manifest: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends well.

    An exception in the block removes it and leaves an existing `target` as it was. Where `target`
    is a link to a folder, that folder is meant. An empty `target` that cannot be replaced, since
    a disk is mounted there or its parent cannot be written, is filled in place: its files appear
    one by one, `manifest` last.

    Args:
        manifest: the file by which readers know such a folder. Only a folder with one is replaced.
        overwrite: replace `target` if it is such a folder.

    Raises:
        EdjeError: as `refuse_existing`, or neither `target` nor its parent can be written, or
            their disk is full.
    """
    refuse_existing(target, overwrite, manifest)
    place = Path(os.path.realpath(target))
    staging = _make_staging(place)
    try:
        yield staging
        sync_tree(staging)
        if staging.parent == place:
            _fill(staging, place, manifest)
        else:
            _swap(staging, place, overwrite)
    except EdjeError:
        raise
    except Exception as error:  # what writes files in Rust raises no OSError
        why = _why_full(error, staging)
        if why is None:
            raise
        raise EdjeError(
            f"cannot write {target}: {why}",
            hint="make room on the disk and try again, or name a folder on another one",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _why_full(error: Exception, staging: Path) -> str | None:
    """Return in words that the disk of `staging` is full, if that is what the error says."""
    # `copyfile` names the source as well, `copytree` tells all its errors in one text, and a
    # write to an open file names nothing.
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and str(staging) not in text:
        return None
    return next((why for code in _FULL if (why := os.strerror(code)) in text), None)


def is_free(target: Path) -> bool:
    """Return whether nothing is in the way of a new `target`: it is not there, or an empty folder.

    In a disk's own folder `lost+found`, and what a killed `publish_folder` has left, is nothing.

    Raises:
        OSError: the folder cannot be listed.
    """
    if not os.path.lexists(target):
        return True
    if not target.is_dir():
        return False
    left = [name for name in os.listdir(target) if not name.startswith(PARTIAL)]
    return not left or (left == [LOST_AND_FOUND] and is_mount(target))


def is_mount(folder: Path) -> bool:
    """Return whether something is mounted at `folder`, so that it cannot be renamed or replaced.

    `os.path.ismount` does not see a folder that is mounted from the same disk (`mount --bind`).
    """
    if os.path.ismount(folder):
        return True
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return False
    place = os.fsencode(os.path.realpath(folder))
    return any(_unescaped(line.split()[4]) == place for line in lines)


def _unescaped(name: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), name)


def refuse_existing(target: Path, overwrite: bool, manifest: str) -> None:
    """Refuse a `target` that must not or cannot be replaced.

    Raises:
        EdjeError: it is no folder, holds other files than one with `manifest` does, may not be
            replaced (`overwrite`), or cannot be, since something is mounted there.
    """
    try:
        if is_free(target):
            return
        is_ours = (target / manifest).is_file()
    except OSError as error:
        raise EdjeError(f"cannot read {target}: {error.strerror or error}") from error
    if not is_ours:
        what = "holds other files" if target.is_dir() else "is no folder"
        raise EdjeError(
            f"{target} exists already, {what} (no {manifest}) and is left as it was",
            hint="name a new or an empty folder",
        )
    if not overwrite:
        raise EdjeError(
            f"{target} exists already and is left as it was",
            hint="pass --overwrite to replace it, or choose another --out",
        )
    if is_mount(target):
        raise EdjeError(
            f"{target} cannot be replaced, since a disk or folder is mounted there; "
            "it is left as it was",
            hint=f"name a folder inside it, as {target / 'new'}, or empty it first",
        )


def _make_staging(target: Path) -> Path:
    """Make a temporary folder beside `target`, or inside where it is empty and must stay."""
    try:
        if is_mount(target):
            return _make_temporary(target, PARTIAL)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            return _make_temporary(target.parent, f".{target.name}.")
        except OSError:
            if not target.is_dir() or not is_free(target):
                raise
            return _make_temporary(target, PARTIAL)
    except OSError as error:
        raise EdjeError(
            f"cannot write {target}: {error.strerror or error}",
            hint="choose another --out, or make its parent folder writable",
        ) from error


def _make_temporary(parent: Path, prefix: str) -> Path:
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    staging.chmod(0o777 & ~_umask())  # mkdtemp makes 0700: a service user must read it
    return staging


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap(staging: Path, target: Path, overwrite: bool) -> None:
    """Rename `staging` to `target`, which stays until then; the rights of an empty one live on."""
    if _is_filled(target) and overwrite:
        _replace(staging, target)
    else:
        if target.exists():
            _take_rights(staging, target)
        try:
            os.rename(staging, target)
        except OSError as error:
            if _is_filled(target):
                raise _filled_meanwhile(target) from error
            raise
    sync_folder(target.parent)


def _is_filled(target: Path) -> bool:
    return target.exists() and not is_free(target)


def _filled_meanwhile(target: Path) -> EdjeError:
    return EdjeError(
        f"somebody else has filled {target} meanwhile; it is left as it was",
        hint="name a new or an empty folder",
    )


def _replace(staging: Path, target: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.rename(target, old / "was")
    try:
        os.rename(staging, target)
    except OSError:
        os.rename(old / "was", target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _take_rights(staging: Path, target: Path) -> None:
    """Give `staging` the owner and the mode of `target`, as far as this user may."""
    rights = target.stat()
    with suppress(OSError):
        os.chown(staging, rights.st_uid, rights.st_gid)
    with suppress(OSError):
        staging.chmod(stat.S_IMODE(rights.st_mode))


def _fill(staging: Path, target: Path, manifest: str) -> None:
    """Move what `staging`, inside the empty `target`, holds one level up; `manifest` last."""
    if not is_free(target):
        raise _filled_meanwhile(target)
    moved: list[str] = []
    try:
        for name in sorted(os.listdir(staging), key=lambda name: name == manifest):
            if name == manifest:
                sync_folder(target)  # whoever finds it finds the others
            os.rename(staging / name, target / name)
            moved.append(name)
        sync_folder(target)
    except BaseException:
        for name in moved:
            with suppress(OSError):
                os.rename(target / name, staging / name)
        raise
    for left in target.glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, so that the rename publishes whole files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() or path.is_dir():
            _sync(path, os.O_RDONLY)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it survive a power loss."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
