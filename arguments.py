"""What callers hand in: taken once, of the right kind, and all that is wrong told at once."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

from .errors import RequestError

StrPath = str | os.PathLike[str]

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
        found = self.items(name, values, "a list of ids")
        if _are_strings(found):
            return found
        wrong = [value for value in found if not isinstance(value, str)]
        if wrong:
            rest = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
            which = ", ".join(map(shown, wrong[:20])) + rest
            self.faults.append(f"{len(wrong)} {name} are not strings: {which}")
            return []
        return plain(found)


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
