"""Count what one call runs: Python functions, and the files of the package that they stand in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import NamedTuple


class Calls(NamedTuple):
    """What ran: `num_calls` Python functions (of any library), `modules` of edje, `depth`."""

    num_calls: int
    modules: frozenset[str]
    depth: int


def count_calls(work: Callable[[], object]) -> Calls:
    """Run `work` once on this thread; return which Python functions it took, itself left out.

    List comprehensions count where they are functions of their own (Python 3.11 and before).
    """
    modules: set[str] = set()
    num_calls = level = depth = 0

    def seen(frame: FrameType, event: str, _: object) -> None:
        nonlocal num_calls, level, depth
        if event == "call":
            num_calls, level = num_calls + 1, level + 1
            depth = max(depth, level)
            name = frame.f_globals.get("__name__", "")
            if name.startswith("edje."):
                modules.add(name)
        elif event == "return":
            level -= 1

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(before)
    return Calls(num_calls - 1, frozenset(modules), depth - 1)
