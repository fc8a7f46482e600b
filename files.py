"""Files from outside: the text of lists that users write, and the hashes that name an input."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from .errors import RequestError

_CHUNK_BYTES = 1 << 20
_MARKS = re.compile("^\ufeff+", re.MULTILINE)  # byte order marks at the beginning of a line


def read_text(path: str | os.PathLike[str], name: str | None = None) -> str:
    """Return the UTF-8 text of a file as `decode_text` does; `name`: what messages call it.

    Raises:
        RequestError: the file cannot be read, or is not UTF-8.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {name or path}: {error.strerror or error}") from error
    return decode_text(content, name or str(path))


def decode_text(content: bytes, name: str) -> str:
    """Return UTF-8 bytes as text whose lines begin with no byte order mark; `\\r` stays.

    Windows tools write the mark, and `cat` carries it into the middle of a file.

    Args:
        name: names the bytes in messages.

    Raises:
        RequestError: not UTF-8, or NUL characters (UTF-16 without a mark); the line is named.
    """
    if b"\0" in content:
        raise RequestError(
            f"{name} is not UTF-8 text: line {_line_of(content, content.index(0))} holds NUL",
            hint="if it is UTF-16, iconv -f UTF-16LE -t UTF-8 makes it UTF-8",
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = _line_of(content, error.start)
        raise RequestError(
            f"{name} is not UTF-8 text: line {line} holds the byte 0x{content[error.start]:02x}",
            hint="save it as UTF-8; iconv -f UTF-16 -t UTF-8 (or -f LATIN1) does so",
        ) from error
    return _MARKS.sub("", text)


def _line_of(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1


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
