"""Lists of ids, one a line, as users write them and as they are written for users."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from ..arguments import decode_text, read_text
from ..errors import RequestError, named


def read_ids(source: str, *, what: str = "ids") -> list[str]:
    """Read one id a line from a file, or from stdin for `-`; blank lines do not count.

    A byte order mark is no part of an id.

    Args:
        source: a path, or `-`.
        what: names the list in messages.

    Raises:
        RequestError: the list cannot be read or is not UTF-8.
    """
    if source == "-":
        text = decode_text(_stdin(what), f"the {what} on stdin")
    else:
        text = read_text(source, f"the {what} {source}")
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def _stdin(what: str) -> bytes:
    if sys.stdin is None:  # closed by the caller: `<&-`
        raise RequestError(
            f"cannot read the {what} from stdin, since it is closed",
            hint="pipe the list into the command, or name a file in place of -",
        )
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise RequestError(
            f"cannot read the {what} from stdin: {error.strerror or error}"
        ) from error


def listed(ids: Iterable[str]) -> str:
    """Return `ids` as the text that `read_ids` reads back.

    Raises:
        RequestError: ids that a line cannot hold, all counted.
    """
    ids = list(ids)
    bad = [name for name in ids if _is_changed_by_a_line(name)]
    if bad:
        raise RequestError(
            f"{len(bad)} ids cannot stand on a line of their own: {named(bad)}",
            hint="use --json",
        )
    return "".join(f"{name}\n" for name in ids)


def _is_changed_by_a_line(name: str) -> bool:
    return "\n" in name or not name.strip() or name.endswith("\r") or name.startswith("\ufeff")
