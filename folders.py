"""Publish a folder whole or not at all: write into a temporary sibling, then rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import EdjeError


@contextmanager
def publish_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `target` that becomes `target` when the block ends well.

    An exception in the block removes the sibling and leaves an existing `target` as it was.

    Raises:
        EdjeError: `target` exists and `overwrite` is false, or its parent cannot be written.
    """
    refuse_existing(target, overwrite)
    staging = _make_sibling(target)
    try:
        yield staging
        sync_tree(staging)
        _swap(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise EdjeError if `target` exists and must not be replaced."""
    if target.exists() and not overwrite:
        raise EdjeError(
            f"{target} exists already and is left as it was",
            hint="pass --overwrite to replace it, or choose another --out",
        )


def _make_sibling(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        staging.chmod(0o777 & ~_umask())  # mkdtemp makes 0700: a service user must read it
    except OSError as error:
        raise EdjeError(
            f"cannot write {target}: {error.strerror or error}",
            hint="choose another --out, or make its parent folder writable",
        ) from error
    return staging


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _swap(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; an old `target` stays until the new one is in place."""
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.rename(target, old / "was")
        try:
            os.rename(staging, target)
        except OSError:
            os.rename(old / "was", target)
            old.rmdir()
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(staging, target)
    sync_folder(target.parent)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, so that the rename publishes whole files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that the names in it survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
