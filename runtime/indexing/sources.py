"""Images by id: folders walked, list files, tars, and which of them are wanted."""

from __future__ import annotations

import io
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np
import xxhash

from ...arrays import UInt64
from ...errors import RequestError, named
from ...files import LOST_AND_FOUND, is_mount

Identities = tuple[tuple[int, int], ...]  # device and inode of each folder


# Ids are UTF-8 in every locale; in one of Latin-1 or plain ASCII Python decodes the bytes of a
# file's name otherwise.
def text_of(name: str | os.PathLike[str]) -> str:
    """Return a name as Python has it as UTF-8 text; a byte that is none is a lone surrogate."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def name_of(text: str) -> str:
    """Return UTF-8 text as the name by which Python opens the file."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def place_of(path: str | os.PathLike[str]) -> str:
    """Return the absolute path as UTF-8 text, as `source` says it."""
    return text_of(os.path.abspath(path))


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
        """Get ready to walk from `root`, itself a link perhaps; `leave_out` is not met."""
        self.num_links = 0
        self._root = root
        self._hidden = os.path.realpath(leave_out) if leave_out else None
        self._follow_links = follow_links

    def names(self) -> Iterator[str | Unlisted]:
        """Yield the path below the root, with `/`, of every file, and the folders in its way."""
        self.num_links = 0
        return self._below(self._root, "", ())

    def _below(self, folder: Path, prefix: str, above: Identities) -> Iterator[str | Unlisted]:
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

    def _sort_name(self, entry: os.DirEntry[str], above: Identities) -> str | None:
        """Return the name, `/` behind a folder's (so paths sort); None: a link not followed."""
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


def _identity(folder: Path | os.DirEntry[str]) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a ring, or through a closed folder: opening it says so
        return False


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class SkippedImage(NamedTuple):
    """What gave no record, and why. `source`: the folder, list or tar (absolute) it came from."""

    id: str
    reason: str
    source: str

    def as_text(self) -> SkippedImage:
        """Return the entry as any file can hold it: a name on disk may be no UTF-8."""
        shown = (value.encode(errors="backslashreplace").decode() for value in self)
        return SkippedImage(*shown)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image to index; picklable.

    Attributes:
        id: of its record.
        path: the file; of a tar's member, the tar.
        source: the folder, list or tar (absolute) that it comes from.
        start: where the bytes of a tar's member begin in `path`; None: `path` is the image.
        num_bytes: of a tar's member.
        content: the bytes, of a compressed tar's member only: there is no seeking in one.
    """

    id: str
    path: Path
    source: str = ""
    start: int | None = None
    num_bytes: int = 0
    content: bytes | None = None

    @property
    def carried_bytes(self) -> int:
        """What it takes in memory besides its names."""
        return len(self.content or b"")

    def open(self) -> Path | BinaryIO:
        """Return what Pillow opens: the path, or the bytes of a tar's member.

        Raises:
            OSError: the tar cannot be read any more.
        """
        if self.content is not None:
            return io.BytesIO(self.content)
        if self.start is None:
            return self.path
        with self.path.open("rb", buffering=0) as file:
            return io.BytesIO(os.pread(file.fileno(), self.num_bytes, self.start))


Wanted = Callable[[str], bool]
Entry_co = TypeVar("Entry_co", covariant=True)


class Source(ABC, Generic[Entry_co]):
    """Images, or features, in a fixed order.

    Attributes:
        names: what the `source` of its skipped images says.
        countable: whether going through `ids` once more is cheap.
        num_ignored: files of other kinds that the last `entries` has passed by.
    """

    names: frozenset[str]
    countable = True
    num_ignored = 0

    @property
    def num_links(self) -> int:
        """Links to folders that the last `entries` has passed by."""
        return 0

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """Yield every id, without opening an image."""

    @abstractmethod
    def entries(self, wanted: Wanted) -> Iterator[Entry_co | SkippedImage]:
        """Yield the entries whose id is wanted, and what cannot be one, with the reason."""

    def estimate(self, num_met: int) -> int:
        """Return about how many ids there are, where `entries` has met `num_met` of them."""
        return num_met


def open_source(
    images: Paths, *, leave_out: Path | None = None, follow_links: bool = False
) -> Source[ImageFile]:
    """Return the source of `images`: a folder, a list file, or tars.

    Args:
        images: a folder (an id is the path below it, with `/`), a list file (`id<TAB>path` a
            line, paths relative to the list), or tars, plain or compressed: one, several, or a
            pattern with numbers in braces, as `{000..099}.tar` (an id is the member's name).
        leave_out: a folder below `images` whose files do not count (the store itself).
        follow_links: go into links to folders too.

    Raises:
        RequestError: missing, empty, or a faulty list file (all faults at once).
    """
    from .tars import TarSource, is_tar, refuse_archive

    given = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    paths = [Path(path) for text in given for path in _expanded(os.fspath(text))]
    if all(is_tar(path) and not path.is_dir() for path in paths) and paths:
        return TarSource(paths)
    if len(paths) != 1:
        raise RequestError(
            f"got {len(paths)} sources of images, expected one folder, one list file, or tars",
            hint="index them one after the other, into the same store",
        )
    (path,) = paths
    source: Source[ImageFile]
    if path.is_dir():
        source = FolderSource(path, leave_out, follow_links)
    elif path.is_file():
        refuse_archive(path)
        source = ListSource(path)
    else:
        hint = "give a folder of images, a list of `id<TAB>path`, or a .tar"
        raise RequestError(f"there is no {path}", hint=hint)
    if not any(True for _ in islice(source.ids(), 1)):
        raise RequestError(f"{path} holds no files to index")
    return source


def _expanded(text: str) -> Iterator[str]:
    """Yield the names that a pattern with `{000..099}` stands for; any other name is itself."""
    braces = _BRACES.search(text)
    if braces is None or os.path.lexists(text):
        yield text
        return
    first, last = braces.groups()
    if int(first) > int(last):
        raise RequestError(
            f"{text}: the range {braces[0]} names no file, expected the smaller number first",
            hint=f"{{{last}..{first}}} names the same files upwards",
        )
    for number in range(int(first), int(last) + 1):
        name = f"{number:0{len(first)}}"
        yield from _expanded(text[: braces.start()] + name + text[braces.end() :])


class FolderSource(Source[ImageFile]):
    """Every file below a folder, sorted by id; holds one folder's names at a time."""

    def __init__(self, root: Path, leave_out: Path | None = None, follow_links: bool = False):
        self.names = frozenset({place_of(root)})
        self._root = root
        self._walk = FolderWalk(root, leave_out=leave_out, follow_links=follow_links)

    @property
    def num_links(self) -> int:
        return self._walk.num_links

    def ids(self) -> Iterator[str]:
        return (text_of(found) for found in self._walk.names() if isinstance(found, str))

    def entries(self, wanted: Wanted) -> Iterator[ImageFile | SkippedImage]:
        (source,) = self.names
        for found in self._walk.names():
            if isinstance(found, Unlisted):
                yield SkippedImage(text_of(found.name), found.reason, source)
            elif wanted(image_id := text_of(found)):
                yield ImageFile(image_id, self._root / found, source)


class ListSource(Source[ImageFile]):
    """The lines `id<TAB>path` of a text file, in its order; checked whole when opened."""

    def __init__(self, path: Path):
        self.names = frozenset({place_of(path)})
        self._path = path
        faults = list(islice(self._faults(), 21))
        if faults:
            more = ["and more faults"] if len(faults) > 20 else []
            raise RequestError(f"{path} is not a list of images", faults=faults[:20] + more)

    def ids(self) -> Iterator[str]:
        return (image_id for _, image_id, _ in self._lines())

    def entries(self, wanted: Wanted) -> Iterator[ImageFile | SkippedImage]:
        (source,) = self.names
        for _, image_id, where in self._lines():
            if wanted(image_id):
                yield ImageFile(image_id, self._path.parent / name_of(where), source)

    def _lines(self) -> Iterator[tuple[int, str, str]]:
        """Yield (number, id, path) of every line that is not empty."""
        for number, line in enumerate(read_lines(self._path, "a list of images"), 1):
            if line:
                image_id, _, where = line.partition("\t")
                yield number, image_id, where

    def _faults(self) -> Iterator[str]:
        hashes = array("Q")  # 8 bytes an id: a list may have many millions
        for number, image_id, where in self._lines():
            hashes.append(id_hash(image_id))
            if not (image_id and where):
                got = f"{image_id}\t{where}" if where else image_id
                yield f"line {number}: got {got[:80]!r}, expected `id<TAB>path`"
        twice = repeated(self.ids, np.frombuffer(hashes, np.uint64))
        if twice:
            yield f"{len(twice)} ids come twice: {named(twice)}"


def id_hash(image_id: str) -> int:
    """Return 64 bits that stand for an id, also for one that is no UTF-8."""
    return xxhash.xxh3_64_intdigest(image_id.encode(errors="surrogateescape"))


def repeated(ids: Callable[[], Iterator[str]], hashes: UInt64) -> list[str]:
    """Return the ids that come more than once, given the `id_hash` of each: uint64 [N]."""
    values, counts = np.unique(hashes, return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return []
    found = Counter(image_id for image_id in ids() if id_hash(image_id) in suspects)
    return [image_id for image_id, count in found.items() if count > 1]


def read_lines(path: Path, what: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without their ends (`\\n` or `\\r\\n`) and byte order marks.

    One line is held at a time: a list may have many millions.

    Raises:
        RequestError: the file cannot be read, or is no UTF-8 text; `what` says what it should be.
    """
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                if "\0" in line:
                    raise RequestError(
                        f"{path} is not {what}: it holds NUL characters, expected UTF-8 text",
                        hint="if it is UTF-16, iconv -f UTF-16LE -t UTF-8 makes it UTF-8",
                    )
                yield line.lstrip("\ufeff").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not {what}: it is no UTF-8 text ({error.reason})",
            hint="sources of images are folders, lists in UTF-8 (iconv -f UTF-16 -t UTF-8 makes "
            "them so) and tars",
        ) from error
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
