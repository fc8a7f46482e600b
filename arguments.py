"""What callers and files hand in: of the right kind, and all that is wrong told at once."""

from __future__ import annotations

import codecs
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeGuard, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from .errors import RequestError, named

StrPath = str | os.PathLike[str]
Progress = Callable[[int, int], None]  # called with (done, total)
Record = TypeVar("Record")

_MARKS = re.compile("^\ufeff+", re.MULTILINE)  # byte order marks at the beginning of a line
_LONE = (str, bytes, bytearray, os.PathLike)


class Arguments:
    """The arguments of one call: every method returns its value ready to use, or notes a fault.

    `check` raises what was noted; until then a faulty value is stood in for by an empty one.

    Attributes:
        faults: one sentence each.
    """

    def __init__(self, call: str):
        """`call` names the function in the message of several faults."""
        self._call = call
        self.faults: list[str] = []

    def check(self) -> None:
        """Raise one RequestError that holds all faults; return where there are none."""
        if len(self.faults) == 1:
            raise RequestError(self.faults[0])
        if self.faults:
            raise RequestError(f"{self._call} cannot be called so", faults=self.faults)

    def refuse(self, name: str, value: object, expected: str) -> None:
        """Note that `value` is not what was expected."""
        self.faults.append(f"{name} is {shown(value)}, expected {expected}")

    def whole(self, name: str, value: object, expected: str, *, least: int = 1) -> int:
        """Return a whole number (Python's or NumPy's, no bool) of at least `least`."""
        if is_whole(value, least):
            return operator.index(value)
        self.refuse(name, value, expected)
        return least

    def number(self, name: str, value: object, expected: str, *, finite: bool = True) -> float:
        """Return a real number (no bool) of 0 or more; `finite` refuses infinity."""
        try:
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            found = float(value) if is_number else -1.0  # type: ignore[arg-type]
        except OverflowError:  # an int beyond all floats
            found = math.inf
        if found >= 0 and (math.isfinite(found) or not finite):
            return found
        self.refuse(name, value, expected)
        return 0.0

    def flag(self, name: str, value: object) -> None:
        """Take True or False and nothing that merely counts as such."""
        if not isinstance(value, bool):
            self.refuse(name, value, "True or False")

    def text(self, name: str, value: object, expected: str = "a string") -> None:
        """Take a string."""
        if not isinstance(value, str):
            self.refuse(name, value, expected)

    def choice(self, name: str, value: object, choices: Sequence[str]) -> None:
        """Take one of some names."""
        if not (isinstance(value, str) and value in choices):
            self.refuse(name, value, " or ".join(f'"{choice}"' for choice in choices))

    def callback(self, name: str, value: object) -> None:
        """Take a function or None."""
        if not (value is None or callable(value)):
            self.refuse(name, value, "a function or None")

    def settings(self, name: str, value: object) -> dict[str, str]:
        """Return a mapping of strings to strings as a dict."""
        if not isinstance(value, Mapping):
            self.refuse(name, value, "a mapping of strings to strings, or None")
            return {}
        for key, found in value.items():
            if not (isinstance(key, str) and isinstance(found, str)):
                self.faults.append(f"{name}: {shown(key)} is {shown(found)}, expected strings")
        return dict(value)

    def path(self, name: str, value: object, expected: str = "a path") -> Path:
        """Return a path given as text or as a path."""
        if isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str):
            return Path(value)
        self.refuse(name, value, expected)
        return Path()

    def items(self, name: str, values: object, expected: str, *, paired: bool = False) -> list[Any]:
        """Return what an iterable gives, which is asked once; a lone string or path is none.

        Args:
            paired: its order matters to something beside it, so a set is refused.
        """
        if isinstance(values, _LONE):
            kind = "string" if isinstance(values, str) else type(values).__name__
            self.faults.append(f"{name}: got the {kind} {str(values)!r:.80}, expected {expected}")
        elif isinstance(values, Mapping):
            kind = f"a {type(values).__name__}"
            self.faults.append(f"{name}: got {kind}, expected {expected}: its keys() or values()")
        elif paired and isinstance(values, set | frozenset):
            self.refuse(name, values, f"{expected} in the order of what belongs to them")
        else:
            try:
                iterator = iter(values)  # type: ignore[call-overload]
            except TypeError:
                self.refuse(name, values, expected)
            else:
                return list(iterator)
        return []

    def strings(self, name: str, values: object) -> list[str]:
        """Return the strings (ids) of an iterable, as `items` does; NumPy's become Python's."""
        found = [*values] if type(values) is list else self.items(name, values, "a list of ids")
        if _are_strings(found):
            return found
        wrong = [value for value in found if not isinstance(value, str)]
        if wrong:
            rest = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
            which = ", ".join(map(shown, wrong[:20])) + rest
            self.faults.append(f"{len(wrong)} {name} are not strings: {which}")
            return []
        return plain(found)


def take_once(options: object, name: str) -> None:
    """Make a tuple of an iterable field of a frozen dataclass, which may be asked only once.

    What is no such iterable stays as it is, to be refused with the other options.
    """
    given = Arguments(name)
    values = given.items(name, getattr(options, name), "a list")
    if not given.faults:
        object.__setattr__(options, name, tuple(values))


def is_whole(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether this is a whole number (Python's or NumPy's, no bool) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return operator.index(value) >= least


def plain(values: list[Any]) -> list[Any]:
    """Return strings of a subclass (NumPy's) as Python's own, everything else as it is."""
    if _are_strings(values):
        return values
    return [str.__str__(value) if isinstance(value, str) else value for value in values]


def _are_strings(values: list[Any]) -> bool:
    return set(map(type, values)) <= {str}


def path_of(name: str, value: object) -> Path:
    """Return a path given as text or as a path.

    Raises:
        RequestError: it is neither.
    """
    given = Arguments(name)
    path = given.path(name, value)
    given.check()
    return path


def shown(value: object) -> str:
    """Return a value as a message shows it: short, and of large things their type only."""
    if value is None or isinstance(value, str | bytes | bool | Real):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return f"an object of type {type(value).__name__}"


def read_text(path: StrPath, name: str | None = None) -> str:
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
            hint=f"if it is text, iconv -f {_wide_encoding(content)} -t UTF-8 makes it UTF-8",
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


def _wide_encoding(content: bytes) -> str:
    """Return iconv's name of the encoding of text with NULs: by its mark, or by where NULs are."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    # Letters of most lists are ASCII, whose other bytes are NUL: the first 3 of 4 in UTF-32BE, the
    # last 3 in UTF-32LE, the first of 2 in UTF-16BE, the last in UTF-16LE.
    nul = [content[place::4].count(0) for place in range(4)]
    order = "BE" if nul[0] > nul[3] else "LE"
    # UTF-32 has no character above U+10FFFF: its highest byte is NUL always, the next nearly so.
    high = content[:2] if order == "BE" else content[2:4]
    return f"UTF-32{order}" if high == b"\0\0" else f"UTF-16{order}"


def _line_of(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1


def read_ids(source: str, *, what: str = "ids") -> list[str]:
    """Read one id a line from a file, or from stdin for `-`; blank lines do not count.

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


def read_fields(kind: type[Record], values: object, where: str, faults: list[str]) -> Record | None:
    """Make a dataclass of a JSON object: nested dataclasses, tuples and mappings of them too.

    Args:
        kind: its fields' types say what is expected; every field must be there.
        values: what `json.loads` gave.
        where: begins the names in faults, as `profile`; may be empty.
        faults: gets one sentence for every field that is missing, unknown or of another type.

    Returns:
        The dataclass, None where something was noted.
    """
    if not isinstance(values, Mapping):
        faults.append(f"{where}: expected an object, got {type(values).__name__}")
        return None
    before, prefix = len(faults), f"{where}." if where else ""
    hints = _type_hints(cast(Hashable, kind))
    faults += [f"{prefix}{name}: missing" for name in sorted(hints.keys() - values.keys())]
    faults += [f"{prefix}{name}: unknown field" for name in sorted(values.keys() - hints.keys())]
    given = sorted(hints.keys() & values.keys())
    made = {name: _read(hints[name], values[name], prefix + name, faults) for name in given}
    return kind(**made) if len(faults) == before else None


_type_hints = cache(get_type_hints)


def _read(hint: Any, value: Any, where: str, faults: list[str]) -> Any:
    """Return a JSON value as the type that `hint` names."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        hint, *others = (one for one in inner if one is not NoneType)
        return value if type(value) in others else _read(hint, value, where, faults)
    if isinstance(hint, type) and is_dataclass(hint):
        return read_fields(hint, value, where, faults)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        if len(kinds) != len(value):
            faults.append(f"{where}: got {len(value)} values, expected {len(kinds)}")
        items = enumerate(zip(kinds, value, strict=False))
        return tuple(_read(kind, item, f"{where}[{n}]", faults) for n, (kind, item) in items)
    if origin is Mapping and isinstance(value, Mapping):
        return {key: _read(inner[1], one, f"{where}.{key}", faults) for key, one in value.items()}
    if hint is Any or type(value) is hint or (hint is float and type(value) is int):
        return value
    faults.append(f"{where}: got {shown(value)}, expected {_name_of(origin or hint)}")
    return None


def _name_of(kind: Any) -> str:
    return {tuple: "a list", Mapping: "an object"}.get(kind) or str(kind.__name__)
