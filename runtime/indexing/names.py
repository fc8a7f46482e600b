"""Names of files as text: ids are UTF-8 in every locale, and Python's own names are not.

In a locale of Latin-1 or plain ASCII Python decodes the bytes of a name otherwise.
"""

from __future__ import annotations

import os


def text_of(name: str | os.PathLike[str]) -> str:
    """Return a name as Python has it as UTF-8 text; a byte that is none is a lone surrogate."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def name_of(text: str) -> str:
    """Return UTF-8 text as the name by which Python opens the file."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def place_of(path: str | os.PathLike[str]) -> str:
    """Return the absolute path as UTF-8 text, as `source` says it."""
    return text_of(os.path.abspath(path))
