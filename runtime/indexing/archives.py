"""What a file is by its first bytes: a tar, a compressed one, or another archive."""

from __future__ import annotations

import tarfile
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from ...errors import RequestError

TAR_SUFFIXES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2"),
    *(".tar.xz", ".txz", ".tar.zst", ".tzst"),
)
_USTAR = (b"ustar", 257)  # where tars of every kind but that of Unix V7 have it
_OTHERS = (
    (b"PK\3\4", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a rar archive"),
    (b"\x04\x22\x4d\x18", "compressed with lz4"),
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
    found: list[type[Exception]] = [tarfile.TarError, EOFError, OSError, ValueError]
    for compression in COMPRESSIONS:
        if compression.is_here:
            error = getattr(import_module(compression.module), compression.error, OSError)
            found.append(error)
    return tuple(found)


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
    magic, place = _USTAR
    if _head(path)[place:].startswith(magic):
        return True
    try:
        compression = compression_of(path)
        if compression is not None:
            tarfile.open(path, f"r:{compression.suffix}").close()  # type: ignore[call-overload]
            return True
    except RequestError:  # said where it is refused
        pass
    except damages():
        pass
    return False


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
