"""Does the gate catch what it is for? Plants slowdowns in the head's sources, and counts.

    python -m edje.perf.gate_trial --repeats 10

The head is this checkout's `HEAD`, and so is the base. Into functions of the head's tree loops are
written that take a tenth of their stage's time (measured here, before): in reading, in tokenising,
in the pipeline, in the server. Each repeat is a run of the gate on these stages, by times alone:
each must fail. What is planted in the pipeline would slow a request down, too, by more than a
tenth: it is planted apart from the others. A no-op change (a comment in each of these files) must
pass: all stages, times and counters.

Expected: every repeat of every kind. Writes gate_trial.json; the checkout itself stays untouched.
"""

from __future__ import annotations

import ast
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from time import monotonic, perf_counter_ns
from typing import Any

from .gate import LIMIT, GateOptions, GateResult, run_gate, usable_core_numbers
from .gate_trees import Tree, lay_out
from .gate_turns import launch
from .harness import Progress, command_line, conditions, run_benchmark

NO_OP = "no-op"
APART = ("pipeline",)
COMMENT = ("# A comment: nothing else changes.",)
TIMED_LOOPS, LOOP_LENGTH = 300, 20_000
NUM_CALIBRATING = 3  # launches: of a stage's time counts the least


@dataclass(frozen=True, slots=True)
class Plant:
    """Where a slowdown goes.

    Attributes:
        stage: that must fail.
        file, function: whose first statement the loop becomes.
    """

    stage: str
    file: str
    function: str


# One run of each stage calls its function once: 256 candidates are one batch.
PLANTS = {
    "reading": Plant("read", "runtime/store/read.py", "SegmentReader.gather"),
    "tokenising": Plant("tokenise", "runtime/text.py", "QueryTokenizer.__call__"),
    "pipeline": Plant("rank", "runtime/pipeline.py", "Pipeline.step"),
    "server": Plant("serve", "runtime/server/service.py", "ScoringService.submit"),
}


def first_line(source: str, function: str) -> tuple[int, int]:
    """Return line (from 0) and column of a function's first statement behind its docstring.

    Raises:
        ValueError: the source has no such function.
    """
    nodes: Sequence[ast.stmt] = ast.parse(source).body
    found: ast.stmt | None = None
    for name in function.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = next((one for one in nodes if isinstance(one, kinds) and one.name == name), None)
        if not isinstance(found, kinds):
            raise ValueError(f"no {function} in the source")
        nodes = found.body
    first = nodes[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(nodes) > 1:
        first = nodes[1]
    return first.lineno - 1, first.col_offset


def planted(source: str, function: str, lines: Sequence[str]) -> str:
    """Return the source with `lines` before the first statement of a function."""
    at, indent = first_line(source, function)
    kept = source.splitlines(keepends=True)
    return "".join([*kept[:at], *(" " * indent + line + "\n" for line in lines), *kept[at:]])


def loop_ns(length: int = LOOP_LENGTH) -> float:
    """Return the least nanoseconds of one turn of a planted loop of so many turns."""
    least = math.inf
    for _ in range(TIMED_LOOPS):
        began = perf_counter_ns()
        for _ in range(length):
            pass
        least = min(least, perf_counter_ns() - began)
    return least / length


def turns_of(nanoseconds: float) -> int:
    """Return how many turns take so long: short loops, whose numbers Python keeps, are faster."""
    about = max(1, round(nanoseconds / loop_ns()))
    return max(1, round(nanoseconds / loop_ns(about)))


def measure(
    kinds: Sequence[str],
    repeats: int,
    minutes: float,
    slowdown: float,
    scratch: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Plant each kind in turn, run the gate, count what it said.

    `minutes`: after which no further round is begun.
    """
    options = GateOptions(cores=usable_core_numbers())
    root = Path(__file__).parent.parent
    work = scratch.absolute() / "trees"
    trees = lay_out(root, work, "HEAD")
    clean = {}
    for name, plant in PLANTS.items():
        clean[name] = (trees.head.package / plant.file).read_text(encoding="utf-8")
        (trees.base.package / plant.file).write_text(clean[name], encoding="utf-8")
    stages = [plant.stage for plant in PLANTS.values()]
    progress("taking the stages' times")
    launches = [
        launch(trees, options.settings(stages, number), work, number=number).stages
        for number in range(NUM_CALIBRATING)
    ]
    times = {
        name: min(one[plant.stage].base_s for one in launches) for name, plant in PLANTS.items()
    }
    turns = {name: turns_of(slowdown * time * 1e9) for name, time in times.items()}
    loops = {name: (f"for _ in range({number}):", "    pass") for name, number in turns.items()}
    groups = [[kind for kind in kinds if kind in PLANTS and kind not in APART]]
    groups += [[kind] for kind in kinds if kind in APART or kind == NO_OP]
    groups = [group for group in groups if group]
    results: dict[str, list[GateResult]] = {kind: [] for kind in kinds}
    loads = []
    until = monotonic() + 60 * minutes
    for number in range(repeats):
        for group in groups if monotonic() < until else ():
            for name, plant in PLANTS.items():
                lines = loops[name] if name in group else COMMENT if group == [NO_OP] else ()
                _write(trees.head, plant, planted(clean[name], plant.function, lines))
            chosen = tuple(PLANTS[name].stage for name in group if name in PLANTS)
            some = replace(options, stages=chosen, counters=False) if chosen else options
            result = run_gate(trees, some, lambda line: None)
            loads.append(round(os.getloadavg()[0], 1))
            failing = [f"{one.benchmark} {one.field}" for one in result.verdicts if one.fails]
            said = f"{number + 1} of {repeats}: {', '.join(failing) or 'passes'}"
            progress(f"{' + '.join(group)}, {said} ({result.seconds:.0f} s, load {loads[-1]})")
            for kind in group:
                results[kind].append(result)
    rows = [
        _row(kind, PLANTS[kind].stage if kind in PLANTS else "", found)
        for kind, found in results.items()
        if found
    ]
    where = conditions(slowdown=slowdown, limit=options.limit, loads=[min(loads), max(loads)])
    return {"conditions": where, "rows": rows, "faults": faults_of(rows)}


def _write(tree: Tree, plant: Plant, text: str) -> None:
    (tree.package / plant.file).write_text(text, encoding="utf-8")


def _row(kind: str, stage: str, results: Sequence[GateResult]) -> dict[str, Any]:
    """Return how often a stage (empty: any) failed, and what was measured of it."""
    failing = [
        [
            f"{one.benchmark} {one.field}"
            for one in result.verdicts
            if one.fails and one.benchmark == (stage or one.benchmark)
        ]
        for result in results
    ]
    measured = [
        found
        for result in results
        for name, found in result.first.items()
        if name == (stage or name)
    ]
    return {
        "kind": kind,
        "stage": stage or "all",
        "repeats": len(results),
        "failed": sum(map(bool, failing)),
        "expected": len(results) if stage else 0,
        "failing": failing,
        "ratios": [round(found.estimate("wall").ratio, 4) for found in measured],
        "sees": [round(found.estimate("wall").sees(LIMIT), 4) for found in measured],
        "launches": [len(found.launches) for found in measured],
        "seconds_per_gate": round(fmean(result.seconds for result in results), 1),
    }


def faults_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each kind that did not go as expected."""
    return [
        f"{row['kind']}: {row['failed']} of {row['repeats']} failed, expected {row['expected']}"
        for row in rows
        if row["failed"] != row["expected"]
    ]


def summary(result: Mapping[str, Any]) -> str:
    """Return the table."""
    lines = [f"{'planted':12} {'stage':9} {'gate failed':12} {'slower by':20} {'s a gate':>8}"]
    for row in result["rows"]:
        spread = f"{min(row['ratios']) - 1:+.1%} to {max(row['ratios']) - 1:+.1%}"
        failed = f"{row['failed']} of {row['repeats']}"
        took = row["seconds_per_gate"]
        lines.append(f"{row['kind']:12} {row['stage']:9} {failed:12} {spread:20} {took:8.0f}")
    where = result["conditions"]
    lines += [f"FALLS SHORT: {fault}" for fault in result["faults"]]
    lines.append(
        f"(planted {where['slowdown']:.0%}, limit {where['limit']:.0%}, {where['cpu']}, "
        f"{where['cores']} cores, load {where['loads'][0]} to {where['loads'][1]}, "
        f"commit {where['commit']})"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = command_line("serve", __doc__)
    parser.prog = f"python -m {__package__}.gate_trial"
    parser.set_defaults(name="gate_trial")
    kinds = [*PLANTS, NO_OP]
    parser.add_argument("--kinds", default=",".join(kinds), help="with commas between")
    parser.add_argument("--repeats", type=int, default=10, help="runs of the gate, each kind")
    parser.add_argument("--slowdown", type=float, default=10.0, help="that is planted, in %%")
    parser.add_argument("--minutes", type=float, default=600.0, help="no further round after")
    options = parser.parse_args(arguments)
    chosen = options.kinds.split(",")
    unknown = [kind for kind in chosen if kind not in kinds]
    if unknown:
        parser.error(f"no kind is called {', '.join(unknown)}, expected {', '.join(kinds)}")
    asked = (chosen, options.repeats, options.minutes, options.slowdown / 100)
    return run_benchmark(options, lambda *more: measure(*asked, *more), summary)


if __name__ == "__main__":
    sys.exit(main())
