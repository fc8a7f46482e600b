"""What a caller asks for, checked: pairs of any iterable, and what ends a request early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic

from ..arguments import Arguments, shown


def split_pairs(given: Arguments, pairs: object) -> tuple[list[str], list[str]]:
    """Return the queries and the ids of (query, id) pairs."""
    expected = "(query, id) tuples"
    found = [(pair, _halves(pair)) for pair in given.items("pairs", pairs, f"a list of {expected}")]
    wrong = [shown(pair) for pair, halves in found if halves is None]
    if wrong:
        given.faults.append(f"{len(wrong)} pairs are no {expected}: {', '.join(wrong[:20])}")
    halves = [both for _, both in found if both is not None]
    queries = given.strings("queries", [query for query, _ in halves])
    return queries, given.strings("ids", [image for _, image in halves])


def _halves(pair: object) -> tuple[object, object] | None:
    """Return the two parts of a pair, None for what is none: letters and sets have no order."""
    if isinstance(pair, str | bytes | Mapping | set | frozenset):
        return None
    try:
        parts = tuple(pair)  # type: ignore[arg-type, var-annotated]
    except TypeError:
        return None
    return (parts[0], parts[1]) if len(parts) == 2 else None


def deadline_of(
    given: Arguments, timeout_s: float | None, cancelled: Callable[[], bool] | None
) -> float | None:
    """Return when the time is up, as `time.monotonic` counts; check what else ends a request."""
    given.callback("cancelled", cancelled)
    if timeout_s is None:
        return None
    expected = "0 or more seconds, or None"
    return monotonic() + given.number("timeout_s", timeout_s, expected, finite=False)
