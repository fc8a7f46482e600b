"""A stage: something to run, measure and check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import EdjeError


@dataclass(frozen=True, slots=True)
class Stage:
    """Something to measure; everything is warm.

    Attributes:
        name: `rank`, or what else it is.
        run: one run.
        pairs: that one run handles.
        check: raises EdjeError where what the last run gave is wrong.
        group: what it is compared with.
        work: other amounts than pairs that one run handles, by the name of their rate.
    """

    name: str
    run: Callable[[], object]
    pairs: int
    check: Callable[[], None]
    group: str = "stages"
    work: Mapping[str, float] = field(default_factory=dict)


def make_stage(
    name: str, run: Callable[[], Any], pairs: int, check: Callable[[Any], None]
) -> Stage:
    """Make a stage whose `check` gets what the last run gave."""
    last: list[Any] = []

    def keep() -> None:
        last[:] = [run()]

    def check_last() -> None:
        if not last:
            keep()
        check(last[0])

    return Stage(name, keep, pairs, check_last)


def expect(right: bool, message: str) -> None:
    """Refuse a wrong result.

    Raises:
        EdjeError: it is not right.
    """
    if not right:
        raise EdjeError(f"{message}; nothing is reported")
