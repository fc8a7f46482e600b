"""WebDataset tars as a source of images: read once, from front to end, nothing held.

What a file is (a tar, a compressed one, another archive) its first bytes say.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from ...errors import RequestError, named
from .images import registered_extensions
from .sources import ImageFile, SkippedImage, Source, Wanted, id_hash, place_of, text_of

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
END_BYTES = 1 << 20  # read at once of what follows the members
MAX_MEMBER_BYTES = 1 << 28  # of a compressed tar, whose members pass through memory
TAR_SUFFIXES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2"),
    *(".tar.xz", ".txz", ".tar.zst", ".tzst"),
)
USTAR_PLACE = 257  # where tars of every kind but that of Unix V7 say `ustar`
_OTHERS = (
    (b"PK\3\4", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a rar archive"),
    (b"\x04\x22\x4d\x18", "compressed with lz4"),
    (b"\x5d\0\0", "compressed with lzma (the old .lzma, not .xz)"),
    (b"LZIP", "compressed with lzip"),
    (b"\x1f\x9d", "compressed with compress (.Z)"),
)


class Compression(NamedTuple):
    """One that `tarfile` reads where Python has the module.

    Attributes:
        suffix: what `tarfile` calls it.
        magic: how its files begin.
        module: of the standard library.
        error: what the module raises for damage.
        name: of the program that unpacks it.
    """

    suffix: str
    magic: bytes
    module: str
    error: str
    name: str

    @property
    def is_here(self) -> bool:
        """Whether this Python reads it."""
        try:
            import_module(self.module)
        except ImportError:
            return False
        return True


COMPRESSIONS = (
    Compression("gz", b"\x1f\x8b", "zlib", "error", "gzip"),
    Compression("bz2", b"BZh", "bz2", "BZ2Error", "bzip2"),  # it raises OSError
    Compression("xz", b"\xfd7zXZ\0", "lzma", "LZMAError", "xz"),
    Compression("zst", b"\x28\xb5\x2f\xfd", "compression.zstd", "ZstdError", "zstd"),
)


def damages() -> tuple[type[Exception], ...]:
    """Return what reading a damaged tar raises, compressed or not."""
    return (
        *(tarfile.TarError, EOFError, OSError, ValueError),
        *(getattr(import_module(c.module), c.error, OSError) for c in COMPRESSIONS if c.is_here),
    )


def compression_of(path: Path) -> Compression | None:
    """Return how a file is compressed, None where it is not, whatever its name says.

    Raises:
        RequestError: in a way that this Python does not read.
        OSError: the file cannot be read.
    """
    head = _head(path)
    found = next((each for each in COMPRESSIONS if head.startswith(each.magic)), None)
    if found is not None and not found.is_here:
        raise RequestError(
            f"{path} is compressed with {found.name}, which this Python does not read",
            hint=f"unpack it ({found.name} -d), or compress it with gzip or xz",
        )
    return found


def is_tar(path: Path) -> bool:
    """Return whether a file is a tar, by its name or by what it holds."""
    if path.name.lower().endswith(TAR_SUFFIXES):
        return True
    if not path.is_file():
        return False
    if _head(path)[USTAR_PLACE:].startswith(b"ustar"):
        return True
    try:
        compression = compression_of(path)
        if compression is None:
            return False
        tarfile.open(path, f"r:{compression.suffix}").close()  # type: ignore[call-overload]
    except damages():
        return False
    except RequestError:  # said where it is refused
        return False
    return True


def refuse_archive(path: Path) -> None:
    """Refuse a file that is no tar, but another archive, by its name.

    Raises:
        RequestError: it is one.
    """
    compression, head = compression_of(path), _head(path)
    found = next((name for magic, name in _OTHERS if head.startswith(magic)), None)
    if compression is not None:
        found = f"compressed with {compression.name} and holds no tar"
    if found is not None:
        raise RequestError(
            f"{path} is {found}, which is not read",
            hint="unpack it: sources of images are folders, lists of `id<TAB>path` and tars, "
            "plain or compressed with gzip, bzip2 or xz",
        )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


class TarSource(Source[ImageFile]):
    """The image members of tars, in their order; ids are the members' names.

    An id that comes twice, a member that is no file, and a tar that is damaged or cut off are
    skipped with the reason; what a damaged tar held before the damage is still read. Remembers a
    hash of every id it has met: 8 bytes each.
    """

    countable = False

    def __init__(self, paths: Sequence[Path]):
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise RequestError(
                f"{len(missing)} of {len(paths)} tars are not there: {named(missing)}"
            )
        self.names = frozenset(place_of(path) for path in paths)
        self._paths = list(paths)
        self._sizes = [path.stat().st_size for path in paths]
        self._compressions = [compression_of(path) for path in paths]
        self._suffixes = IMAGE_SUFFIXES | registered_extensions()
        self._bytes_read = 0

    def ids(self) -> Iterator[str]:
        met: list[str] = []
        for _ in self._walk(lambda image_id: met.append(image_id) or False):  # type: ignore[func-returns-value]
            yield from met
            met.clear()

    def entries(self, wanted: Wanted) -> Iterator[ImageFile | SkippedImage]:
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
        self, path: Path, file: BinaryIO, packed: Compression | None, seen: _Seen, wanted: Wanted
    ) -> Iterator[ImageFile | SkippedImage | None]:
        """Yield what the members of one tar give; last, how the tar is damaged."""
        source, last = place_of(path), "its start"
        suffix = packed.suffix if packed else ""
        size = None if packed else os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode=f"r:{suffix}", encoding="utf-8") as tar:  # type: ignore[call-overload]
                for member in _members(tar, size):
                    yield self._entry(tar, path, member, seen, wanted, size is not None)
                    last = repr(member.name)
                _read_to_end(tar)
        except _LateDamage as error:
            yield SkippedImage(text_of(path.name), f"the tar is damaged: {error}", source)
        except damages() as error:
            reason = f"the tar is damaged or cut off after {last}: {str(error).rstrip('.')}"
            yield SkippedImage(text_of(path.name), f"{reason}; what came before was read", source)

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
        source = place_of(path)
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


class _LateDamage(Exception):
    """What shows when all members have been read."""


def _members(tar: tarfile.TarFile, size: int | None) -> Iterator[tarfile.TarInfo]:
    """Yield every whole member; raise where the tar, of `size` bytes, ends as it should not."""
    end = 0
    file = tar.fileobj
    if file is None:
        raise _TarDamage("it is closed")
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it keeps every member that it has met
        if tar.offset <= end:  # a negative size leads back, and round in a ring
            raise _TarDamage(f"{member.name!r} has a size that cannot be")
        end = tar.offset
        if size is not None and member.isreg() and _end_of(member) > size:
            raise _TarDamage(f"{member.name!r} is not there whole")
        yield member
    file.seek(tar.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise _TarDamage(
            "there is no mark of its end" if not block else "no header where one belongs"
        )


def _end_of(member: tarfile.TarInfo) -> int:
    """Return where a member's bytes end; `size` counts the holes of a sparse one too."""
    parts = getattr(member, "sparse", None)  # (place, bytes) of what is no hole
    stored = member.size if parts is None else sum(num_bytes for _, num_bytes in parts)
    return member.offset_data + stored


def _read_to_end(tar: tarfile.TarFile) -> None:
    """Read what follows the mark of a tar's end: zeros, and the checksum of its compression."""
    file = tar.fileobj
    try:
        while file is not None and (block := file.read(END_BYTES)):
            if block.count(0) != len(block):
                raise _LateDamage(
                    "more follows the mark of its end, which was not read, as where `cat` has "
                    "joined tars; give them one by one, or join them with `tar -A`"
                )
    except damages() as error:
        raise _LateDamage(
            f"{str(error).rstrip('.')}; its images were read, but any of them may be wrong: "
            "index a whole copy of it into a new store"
        ) from error
