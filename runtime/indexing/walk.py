"""Every file below a folder, in the order of the whole paths; links to folders as asked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ...folders import LOST_AND_FOUND, is_mount

Identity = tuple[int, int]


class Unlisted(NamedTuple):
    """A folder that cannot be listed, and why."""

    name: str
    reason: str


class FolderWalk:
    """Holds one folder's names at a time.

    Attributes:
        num_links: links to folders that the last walk passed by: all of them, or, where links are
            followed, those that lead back to a folder above.
    """

    def __init__(self, root: Path, *, leave_out: Path | None = None, follow_links: bool = False):
        """Get ready to walk.

        Args:
            root: where to begin; may itself be a link.
            leave_out: a folder below whose files do not count.
            follow_links: go into links to folders too, as `find -L` does.
        """
        self.num_links = 0
        self._root = root
        self._hidden = os.path.realpath(leave_out) if leave_out else None
        self._follow_links = follow_links

    def names(self) -> Iterator[str | Unlisted]:
        """Yield the path below the root, with `/`, of every file, and the folders in its way."""
        self.num_links = 0
        return self._below(self._root, "", ())

    def _below(
        self, folder: Path, prefix: str, above: tuple[Identity, ...]
    ) -> Iterator[str | Unlisted]:
        try:
            above = (*above, _identity(folder))
            with os.scandir(folder) as found:
                names = sorted(name for entry in found if (name := self._sort_name(entry, above)))
        except OSError as error:
            yield Unlisted(prefix, f"cannot be listed: {error.strerror}")
            return
        for name in names:
            if not name.endswith("/"):
                yield prefix + name
            elif not self._is_hidden(folder, prefix, name):
                yield from self._below(folder / name, prefix + name, above)

    def _sort_name(self, entry: os.DirEntry[str], above: tuple[Identity, ...]) -> str | None:
        """Return the name, with `/` behind a folder's: so sorted, the whole paths are in order.

        None for a link to a folder that is not followed.
        """
        if entry.is_dir(follow_symlinks=False):
            return f"{entry.name}/"
        if not (entry.is_symlink() and _leads_to_folder(entry)):
            return entry.name
        if self._follow_links and _identity(entry) not in above:
            return f"{entry.name}/"
        self.num_links += 1
        return None

    def _is_hidden(self, folder: Path, prefix: str, name: str) -> bool:
        """Whether it is the folder to leave out, or one that mkfs made in a disk's root."""
        if name == f"{LOST_AND_FOUND}/" and not prefix and is_mount(folder):
            return True
        return self._hidden == os.path.realpath(folder / name)


def _identity(folder: Path | os.DirEntry[str]) -> Identity:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a ring, or through a closed folder: opening it says so
        return False
