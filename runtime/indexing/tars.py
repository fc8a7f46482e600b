"""WebDataset tars as a source of images: read once, from front to end, nothing held."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from ...errors import RequestError, named
from .archives import Compression, compression_of, damages
from .pillow_settings import registered_extensions
from .sources import ImageFile, SkippedImage, Wanted, id_hash

# Members with other endings (captions, labels, metadata) belong to a sample, but are no images.
IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "avifs", "bmp", "gif", "heic", "heics", "heif", "heifs", "hif", "ico"),
        *("j2c", "j2k", "jfif", "jp2", "jpc", "jpe", "jpeg", "jpf", "jpg", "jpx", "jxl", "pbm"),
        *("pgm", "png", "pnm", "ppm", "psd", "qoi", "tga", "tif", "tiff", "webp"),
    )
)
MAX_LATEST = 1 << 16  # hashes in a set, at some 70 bytes each
MAX_MEMBER_BYTES = 1 << 28  # of a compressed tar, whose members pass through memory


class TarSource:
    """The image members of tars, in their order; ids are the members' names.

    An id that comes twice, a member that is no file, and a tar that is damaged or cut off are
    skipped with the reason; what a damaged tar held before the damage is still read. Remembers a
    hash of every id it has met: 8 bytes each.
    """

    countable = False
    num_links = 0

    def __init__(self, paths: Sequence[Path]):
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise RequestError(
                f"{len(missing)} of {len(paths)} tars are not there: {named(missing)}"
            )
        self.names = frozenset(os.path.abspath(path) for path in paths)
        self.num_ignored = 0
        self._paths = list(paths)
        self._sizes = [path.stat().st_size for path in paths]
        self._compressions = [compression_of(path) for path in paths]
        self._suffixes = IMAGE_SUFFIXES | registered_extensions()
        self._bytes_read = 0

    def ids(self) -> Iterator[str]:
        """Yield the name of every image member; reads the tars through."""
        met: list[str] = []
        for _ in self._walk(lambda image_id: met.append(image_id) or False):  # type: ignore[func-returns-value]
            yield from met
            met.clear()

    def entries(self, wanted: Wanted) -> Iterator[ImageFile | SkippedImage]:
        """Yield the wanted image members, and what cannot be one."""
        return (entry for entry in self._walk(wanted) if entry is not None)

    def estimate(self, num_met: int) -> int:
        """Return `num_met` over the share of bytes read so far."""
        return max(num_met, round(num_met * sum(self._sizes) / max(self._bytes_read, 1)))

    def _walk(self, wanted: Wanted) -> Iterator[ImageFile | SkippedImage | None]:
        """Yield what every member gives, None where that is nothing."""
        self.num_ignored = self._bytes_read = before = 0
        seen = _Seen()
        tars = zip(self._paths, self._sizes, self._compressions, strict=True)
        for path, size, compression in tars:
            with path.open("rb") as file:
                for entry in self._read(path, file, compression, seen, wanted):
                    self._bytes_read = before + file.tell()
                    yield entry
            before += size
            self._bytes_read = before

    def _read(
        self,
        path: Path,
        file: BinaryIO,
        compression: Compression | None,
        seen: _Seen,
        wanted: Wanted,
    ) -> Iterator[ImageFile | SkippedImage | None]:
        """Yield what the members of one tar give; last, how the tar is damaged."""
        source, last = os.path.abspath(path), "its start"
        suffix = compression.suffix if compression else ""
        size = None if compression else os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode=f"r:{suffix}") as tar:  # type: ignore[call-overload]
                for member in _members(tar, size):
                    yield self._entry(tar, path, member, seen, wanted, size is not None)
                    last = repr(member.name)
        except damages() as error:
            reason = f"the tar is damaged or cut off after {last}: {str(error).rstrip('.')}"
            yield SkippedImage(path.name, f"{reason}; what came before was read", source)

    def _entry(
        self,
        tar: tarfile.TarFile,
        path: Path,
        member: tarfile.TarInfo,
        seen: _Seen,
        wanted: Wanted,
        plain: bool,
    ) -> ImageFile | SkippedImage | None:
        """Return what a member gives: an image, a reason, or nothing; `plain`: not compressed."""
        if member.isdir() or PurePosixPath(member.name).suffix.lower() not in self._suffixes:
            self.num_ignored += not member.isdir()
            return None
        source = os.path.abspath(path)
        if not seen.add(id_hash(member.name)):
            return SkippedImage(member.name, "comes a second time; the first one counts", source)
        if not wanted(member.name):
            return None
        if not member.isreg():
            return SkippedImage(member.name, "is a link or a device, not a file", source)
        if plain and not member.issparse():
            return ImageFile(member.name, path, source, member.offset_data, member.size)
        if member.size > MAX_MEMBER_BYTES:
            reason = f"takes {member.size:,} bytes, at most {MAX_MEMBER_BYTES:,} are read"
            return SkippedImage(member.name, reason, source)
        content = tar.extractfile(member)
        return ImageFile(member.name, path, source, content=content.read() if content else b"")


class _Seen:
    """Hashes that came by: most of them in a sorted array, the latest in a set."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._latest: set[int] = set()

    def add(self, key: int) -> bool:
        """Remember a hash; return whether it is new."""
        at = int(np.searchsorted(self._sorted, np.uint64(key)))
        if key in self._latest or (at < len(self._sorted) and int(self._sorted[at]) == key):
            return False
        self._latest.add(key)
        if len(self._latest) >= MAX_LATEST:
            latest = np.fromiter(self._latest, np.uint64, len(self._latest))
            merged = np.concatenate([self._sorted, np.sort(latest)])
            self._sorted = np.sort(merged, kind="stable")  # two runs: linear
            self._latest.clear()
        return True


class _TarDamage(tarfile.TarError):
    """What `tarfile` passes over in silence."""


def _members(tar: tarfile.TarFile, size: int | None) -> Iterator[tarfile.TarInfo]:
    """Yield every member that is there whole; raise where the tar does not end as it should.

    `size` is the file's, where it is not compressed.
    """
    end = 0
    file = tar.fileobj
    if file is None:
        raise _TarDamage("it is closed")
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it keeps every member that it has met
        if tar.offset <= end:  # a negative size leads back, and round in a ring
            raise _TarDamage(f"{member.name!r} has a size that cannot be")
        end = tar.offset
        if size is not None and member.isreg() and member.offset_data + member.size > size:
            raise _TarDamage(f"{member.name!r} is not there whole")
        yield member
    file.seek(tar.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise _TarDamage(
            "there is no mark of its end" if not block else "no header where one belongs"
        )
