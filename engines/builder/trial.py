"""What `auto` found out about one backend and precision, and how that is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..registry import by_reason


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one backend and precision.

    Attributes:
        pairs_per_s: of the fastest of several: a forward on a CPU, or some on a
            GPU that has the pairs already; None where it was not timed.
        kendall_tau, top_1: agreement with float32; None where it was not measured.
        refused: why it was not taken, but for being slower; None where it could have been.
        not_tried: why it was not even built; None where it was.
        is_first: built for a cascade's first stage, whose survivors are scored again.
        rescored: the share of the candidates that would be (`Agreement.rescored`).
    """

    backend: str
    precision: str
    pairs_per_s: float | None = None
    kendall_tau: float | None = None
    top_1: float | None = None
    refused: str | None = None
    not_tried: str | None = None
    is_first: bool = False
    rescored: float | None = None


def trial_lines(trials: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield what `--backend auto` made of each backend and precision of a manifest's `auto`.

    The fastest comes first. Those that were not tried come last, one line for all that share a
    backend and a reason.
    """
    skipped: dict[str, list[tuple[str, str | None]]] = {}
    for trial in sorted(trials, key=lambda trial: -(trial["pairs_per_s"] or 0)):
        backend, precision, agrees = trial["backend"], trial["precision"], trial["kendall_tau"]
        skipped.setdefault(backend, []).append((precision, trial["not_tried"]))
        if trial["not_tried"] is None:
            figures = f"{trial['pairs_per_s'] or 0:,.0f} pairs/s, Kendall tau {agrees or 0:.4f}"
            first = " (first)" if trial.get("is_first") else ""
            yield f"{backend} {precision}{first}", trial["refused"] or figures
    for backend, verdicts in skipped.items():
        for reason, precisions in by_reason(verdicts).items():
            yield f"{backend} {' '.join(precisions)}", f"not tried: {reason}"


def why_chosen(backend: str, precision: str, trials: Iterable[Mapping[str, Any]]) -> str | None:
    """Say what one of a manifest's `auto` is faster than; None where it was not the fastest."""
    timed = [one for one in trials if one["pairs_per_s"] and not one.get("is_first")]
    timed.sort(key=lambda one: -float(one["pairs_per_s"]))
    if not timed or (timed[0]["backend"], timed[0]["precision"]) != (backend, precision):
        return None
    if len(timed) == 1:
        return "the only one that ranks as float32 does"
    ratio, second = timed[0]["pairs_per_s"] / timed[1]["pairs_per_s"], timed[1]
    return (
        f"the fastest of {len(timed)} that rank as float32 does: {ratio:.2f} times "
        f"{second['backend']} {second['precision']}"
    )
