"""Peers and we on the same question in turns: who takes part, whose scores agree, what it cost.

Every contestant scores so many pairs a turn that a turn takes seconds at most; what is compared is
the cost of a pair. The scores of all that compute our function are compared with those of the
official code in float32 before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...arrays import Float32
from ...engines.agreement import kendall_tau
from ...errors import EdjeError
from ..harness import Progress, Times, settle
from ..random_model import Pairs
from ..report import Measured

Run = Callable[[], Float32]
Function = Literal["float32", "rounded", "other"]
Kind = Literal["ours", "library", "peer"]

GROUP = "peers"
NUM_CHECKED = 64  # pairs whose scores are compared: the official code takes a second for 32
FLOAT32_TOLERANCE = 1e-4
LEAST_CORRELATION = 0.95  # of scores in lower precision; random weights: int8 has 0.99


class SkippedError(EdjeError):
    """A peer cannot take part here; the message says why."""


@dataclass(frozen=True, slots=True)
class Question:
    """One query over the candidates of the store, as each contestant wants it.

    Attributes:
        text: the query.
        pairs: its ids `[CLS] wordpieces [SEP]`, int32 [1, T] without padding, and the tokens of
            the candidates, float16 [N, m, H].
    """

    text: str
    pairs: Pairs


@dataclass(frozen=True, slots=True)
class Bench:
    """What contestants are made from, and what frees them.

    Attributes:
        bundle: folder of the model.
        engines: folder that keeps engines, each built once.
        store: folder of the token store with the candidates.
        ids: of the candidates, in the order of the questions' tokens.
        stack: closes what they opened.
        scratch: folder for their files.
        device: PyTorch's name, `cpu` or `cuda`.
        progress: called with a line before what takes long.
        kept: what several contestants share, by name, made by the first.
    """

    bundle: Path
    engines: Path
    store: Path
    ids: Sequence[str]
    stack: ExitStack
    scratch: Path
    device: str = "cpu"
    progress: Progress = lambda line: None
    kept: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what `make` gives, made at the first call for `name`."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]


Ask = Callable[[Question, int], Run]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to score pairs.

    Attributes:
        name: its id: in tables, in the JSON and in `PLAN.md`.
        what: in words, for the table.
        pairs: that one turn scores.
        make: opens it; what it returns gives the run of so many pairs of a question, and the run
            their scores. Raises SkippedError where it cannot take part.
        function: `float32` and `rounded` compute our function, `other` another one.
        kind: ours; a `library` that we call, called directly; or a `peer`.
        rivals: of ours: the names that call its library directly, on the same graph and precision.
        is_slow: takes one turn only, however many rounds there are.
    """

    name: str
    what: str
    pairs: int
    make: Callable[[Bench], Ask]
    function: Function = "float32"
    kind: Kind = "peer"
    rivals: tuple[str, ...] = ()
    is_slow: bool = False


def opened(
    contestants: Sequence[Contestant], bench: Bench
) -> tuple[dict[str, Ask], dict[str, str]]:
    """Open everybody; return who takes part, and the reason of everybody who does not."""
    taking_part: dict[str, Ask] = {}
    skipped: dict[str, str] = {}
    for one in contestants:
        bench.progress(f"opening {one.name}")
        try:
            taking_part[one.name] = one.make(bench)
        except SkippedError as reason:
            skipped[one.name] = str(reason)
    return taking_part, skipped


def contest(
    contestants: Sequence[Contestant],
    asks: Mapping[str, Ask],
    question: Question,
    expected: Float32,
    *,
    num_rounds: int,
    seconds: float = inf,
    progress: Progress = lambda line: None,
) -> tuple[list[Measured], dict[str, str]]:
    """Warm everybody up, check their scores, let them take turns.

    Args:
        expected: float32 [n], scores of the question's first pairs.
        num_rounds, seconds: `most` rounds and `seconds` of `settle`.

    Returns:
        What everybody took, and the reason of everybody who turned out unable to score this.

    Raises:
        EdjeError: somebody's scores are not those of the model (all are named).
    """
    runs: dict[str, Run] = {}
    agreement: dict[str, dict[str, float]] = {}
    faults: list[str] = []
    skipped: dict[str, str] = {}
    by_name = {one.name: one for one in contestants if one.name in asks}
    for name, one in by_name.items():
        progress(f"{question.pairs.num_wordpieces} wordpieces: warming up {name}")
        try:
            run = asks[name](question, one.pairs)
            scores = run()
        except SkippedError as reason:
            skipped[name] = str(reason)
            continue
        runs[name] = run
        if len(scores) != one.pairs or not np.isfinite(scores).all():
            faults.append(f"{name}: {len(scores)} scores of {one.pairs} pairs, or not finite")
        elif one.function != "other":
            agreement[name], fault = compared(scores, expected, one.function)
            faults += [f"{name}: {fault}"] if fault else []
    if faults:
        raise EdjeError("contestants disagree on the scores; nothing is reported", faults=faults)
    progress(f"{question.pairs.num_wordpieces} wordpieces: {len(runs)} in turns")
    slow = [name for name in runs if by_name[name].is_slow]
    compared_ones = [{one.name, *one.rivals} for one in by_name.values() if one.rivals]
    times = settle(runs, most=num_rounds, seconds=seconds, once=slow, together=compared_ones)
    made = [
        _measured(by_name[name], question, took, agreement.get(name, {}))
        for name, took in times.items()
    ]
    return made, skipped


def compared(
    scores: Float32, expected: Float32, function: Function
) -> tuple[dict[str, float], str | None]:
    """Compare scores with the official code's; return the facts, and what is wrong with them."""
    known = min(len(scores), len(expected))
    found, right = scores[:known], expected[:known]
    difference = float(np.abs(found - right).max())
    correlation = float(np.corrcoef(found, right)[0, 1])
    facts = {
        "max_abs_diff": difference,
        "correlation": round(correlation, 6),
        "kendall_tau": round(kendall_tau(right, found), 6),
    }
    if function == "float32" and not difference <= FLOAT32_TOLERANCE:
        return facts, f"off by {difference:.2e}, expected at most {FLOAT32_TOLERANCE:.0e}"
    if not correlation >= LEAST_CORRELATION:
        return facts, f"correlation {correlation:.3f}, expected at least {LEAST_CORRELATION}"
    return facts, None


def _measured(
    one: Contestant, question: Question, took: Times, agreement: Mapping[str, float]
) -> Measured:
    return Measured(
        one.name,
        GROUP,
        [ms / 1e3 for ms in took.wall_ms],
        pairs=one.pairs,
        params={"wordpieces": question.pairs.num_wordpieces},
        cpu_seconds=[ms / 1e3 for ms in took.cpu_ms],
        conditions={
            "what": one.what,
            "function": one.function,
            "ours": one.kind == "ours",
            "kind": one.kind,
            "agreement": dict(agreement),
        },
    )
