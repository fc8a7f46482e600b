"""Files from outside: the text of lists that users write, and the hashes that name an input."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from .errors import RequestError

_CHUNK_BYTES = 1 << 20
_MARKS = re.compile("^\ufeff+", re.MULTILINE)  # byte order marks at the beginning of a line


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the UTF-8 text of a file as `decode_text` does.

    Raises:
        RequestError: the file cannot be read, or is not UTF-8.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from error
    return decode_text(content, str(path))


def decode_text(content: bytes, name: str) -> str:
    """Return UTF-8 bytes as text whose lines begin with no byte order mark; `\\r` stays.

    Windows tools write the mark, and `cat` carries it into the middle of a file.

    Args:
        name: names the bytes in messages.

    Raises:
        RequestError: not UTF-8; the first line that is not is named.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"{name} is not UTF-8 text: line {line} holds the byte 0x{content[error.start]:02x}",
            hint="save it as UTF-8; iconv -f UTF-16 -t UTF-8 (or -f LATIN1) does so",
        ) from error
    return _MARKS.sub("", text)


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
