"""Lists of ids as text: one a line, UTF-8, from a file or stdin."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import RequestError, named


def read_ids(source: str, *, what: str = "ids") -> list[str]:
    """Read one id a line from a file, or from stdin for `-`; blank lines do not count.

    Args:
        source: a path, or `-`.
        what: names the list in messages.

    Raises:
        RequestError: the list cannot be read or is not UTF-8.
    """
    try:
        content = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        lines = content.decode("utf-8").split("\n")
    except OSError as error:
        raise RequestError(f"cannot read the {what} {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"the {what} {source} are not UTF-8 text: {error}") from error
    return [line.rstrip("\r") for line in lines if line.strip()]


def listed(ids: Sequence[str]) -> str:
    """Return `ids` as the text that `read_ids` reads back.

    Raises:
        RequestError: ids that a line cannot hold, all counted.
    """
    bad = [name for name in ids if "\n" in name or not name.strip() or name.endswith("\r")]
    if bad:
        raise RequestError(
            f"{len(bad)} ids cannot stand on a line of their own: {named(bad)}",
            hint="use --json",
        )
    return "".join(f"{name}\n" for name in ids)
