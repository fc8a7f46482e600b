"""A recording file layer: what a store's folder may look like when the power fails at any moment.

What was synced stays. Of the rest a random part stays, as a disk may choose: unsynced writes sector
by sector, a file's size, and each name that was made or removed in a folder that was not synced.
SQLite is taken at its word: a commit that has returned is there.
"""

from __future__ import annotations

import os
import random
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from disk_changes import CHANGES
from edje.runtime.store import disk
from edje.runtime.store.catalog import Catalog

SECTOR_BYTES = 512
CATALOG = "catalog.sqlite"


@dataclass
class File:
    """One file (not a name): what is on disk for certain, and what was written since."""

    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # None: cut there

    def sync(self) -> None:
        self.durable, self.pending = self.whole(), []

    def whole(self) -> bytes:
        """Return the content with everything that was written."""
        return self.outcome(lambda: True)

    def outcome(self, kept: Callable[[], bool]) -> bytes:
        """Return the content after a power loss that keeps what `kept` says."""
        content, size = bytearray(self.durable), len(self.durable)
        for offset, data in self.pending:
            if data is None:
                if kept():
                    del content[offset:]
                size = offset if kept() else size
                continue
            end = offset + len(data)
            content.extend(bytes(max(0, end - len(content))))
            for at in range(offset, end, SECTOR_BYTES):
                if kept():
                    stop = min(at + SECTOR_BYTES, end)
                    content[at:stop] = data[at - offset : stop - offset]
            size = max(size, end) if kept() else size
        return bytes(content[:size]).ljust(size, b"\0")


@dataclass
class Folder:
    """The names in one folder: those on disk for certain, and the changes since."""

    durable: dict[str, int] = field(default_factory=dict)
    pending: list[dict[str, int | None]] = field(default_factory=list)  # None: the name goes

    def sync(self) -> None:
        self.durable, self.pending = self.outcome(lambda: True), []

    def outcome(self, kept: Callable[[], bool]) -> dict[str, int]:
        """Return name -> file after a power loss that keeps what `kept` says."""
        names: dict[str, int | None] = dict(self.durable)
        for change in self.pending:
            if kept():
                names.update(change)
        return {name: file for name, file in names.items() if file is not None}


class PowerLoss:
    """Records what a store changes on disk, and builds what may be left of it.

    `syncs` says which calls count: a disk that lies about one of them is a control that the
    tests must find out.
    """

    def __init__(self, root: Path, *, syncs: tuple[str, ...] = ("sync", "sync_folder")):
        self._root = root
        self._syncs = syncs
        self._files: dict[int, File] = {}
        self._file_of_inode: dict[int, int] = {}
        self._folders: dict[Path, Folder] = {}
        self._catalog = b""
        self._paused = False
        self.on_event: Callable[[], None] = lambda: None
        for path in root.rglob("*"):
            if path.is_file() and not path.name.startswith(CATALOG):
                number = self._add_file(path.stat().st_ino, path.read_bytes())
                self._folder(path).durable[path.name] = number
        self._copy_catalog()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put the recorder between the store and the disk."""
        for name in CHANGES:
            self._record(patch, disk, name, getattr(self, f"_{name}"))
        for name in ("commit", "forget_retired"):
            self._record(patch, Catalog, name, lambda *_: self._copy_catalog())

    def build(self, target: Path, pick: random.Random, share: float) -> None:
        """Write the folder as a power loss at this moment may leave it.

        Args:
            share: of the unsynced changes, how many stay: 0 none, 1 all.
        """

        def kept() -> bool:
            return pick.random() < share

        contents = {number: file.outcome(kept) for number, file in self._files.items()}
        for path in self._root.rglob("*"):
            if path.is_dir():
                (target / path.relative_to(self._root)).mkdir(parents=True, exist_ok=True)
        for path, folder in self._folders.items():
            for name, number in folder.outcome(kept).items():
                (target / path.relative_to(self._root) / name).write_bytes(contents[number])
        (target / CATALOG).write_bytes(self._catalog)

    def blind_spots(self) -> list[str]:
        """Return the files that changed past the recorder: there must be none."""
        with tempfile.TemporaryDirectory() as folder:
            self.build(Path(folder), random.Random(0), 1.0)
            seen, real = _listing(Path(folder)), _listing(self._root)
        return sorted(
            name for name in seen.keys() | real.keys() if seen.get(name) != real.get(name)
        )

    def _record(
        self, patch: pytest.MonkeyPatch, owner: object, name: str, note: Callable[..., None]
    ) -> None:
        call = getattr(owner, name)

        def recorded(*arguments: object, **options: object) -> object:
            result = call(*arguments, **options)
            if not self._paused:
                note(result, *arguments)
                self._paused = True  # what is done to a folder that was left is no change of ours
                self.on_event()
                self._paused = False
            return result

        patch.setattr(owner, name, recorded)

    def _create(self, descriptor: int, path: Path) -> None:
        number = self._add_file(os.fstat(descriptor).st_ino, b"")
        self._folder(path).pending.append({path.name: number})

    def _write(self, _: None, descriptor: int, pieces: list[bytes], offset: int) -> None:
        self._file(os.fstat(descriptor)).pending.append((offset, b"".join(pieces)))

    def _sync(self, _: None, descriptor: int) -> None:
        if "sync" in self._syncs:
            self._file(os.fstat(descriptor)).sync()

    def _truncate(self, _: None, path: Path, size: int) -> None:
        self._file(path.stat()).pending.append((size, None))

    def _unlink(self, _: None, path: Path) -> None:
        self._folder(path).pending.append({path.name: None})

    def _link(self, _: None, __: Path, target: Path) -> None:
        self._folder(target).pending.append({target.name: self._number(target.stat())})

    def _rename(self, _: None, source: Path, target: Path) -> None:
        number = self._number(target.stat())
        if source.parent == target.parent:
            change: dict[str, int | None] = {target.name: number, source.name: None}
            self._folder(target).pending.append(change)
        else:  # two folders reach the disk on their own
            self._folder(target).pending.append({target.name: number})
            self._folder(source).pending.append({source.name: None})

    def _sync_folder(self, _: None, folder: Path) -> None:
        if "sync_folder" in self._syncs:
            self._folders.setdefault(folder, Folder()).sync()

    def _copy_catalog(self) -> None:
        with tempfile.NamedTemporaryFile() as copy:
            connections = (sqlite3.connect(name) for name in (self._root / CATALOG, copy.name))
            with closing(next(connections)) as source, closing(next(connections)) as target:
                source.backup(target)
            self._catalog = Path(copy.name).read_bytes()

    def _add_file(self, inode: int, content: bytes) -> int:
        number = len(self._files)
        self._files[number] = File(content)
        self._file_of_inode[inode] = number  # numbers of files that are gone are used again
        return number

    def _number(self, stat: os.stat_result) -> int:
        return self._file_of_inode[stat.st_ino]

    def _file(self, stat: os.stat_result) -> File:
        return self._files[self._number(stat)]

    def _folder(self, path: Path) -> Folder:
        return self._folders.setdefault(path.parent, Folder())


def _listing(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(CATALOG)
    }
