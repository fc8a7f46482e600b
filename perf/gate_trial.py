"""Does the gate catch what it is for? Plants slowdowns in the head's sources, and counts.

    python -m edje.perf.gate_trial --repeats 10             (a quarter of an hour, quiet)
    python -m edje.perf.gate_trial --repeats 10 --resume    (go on where one was interrupted)

The head is this checkout's `HEAD`, and so is the base. Into functions of the head's tree loops are
written that take a tenth of their stage's time (measured here, before): in reading, in tokenising,
in the pipeline, in the server. Each repeat is a run of the gate on these stages, by times alone:
each must fail. What is planted in the pipeline would slow a request down, too, by more than a
tenth: it is planted apart from the others. A no-op change (a comment in each of these files) must
pass: all stages, times and counters.

Expected: every repeat of every kind. gate_trial.json is written anew after every run of the gate;
the checkout itself stays untouched. Other work on the machine makes the gate take more launches, so
a trial takes longer, and its JSON keeps the load of every run.
"""

from __future__ import annotations

import ast
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from time import monotonic, perf_counter_ns
from typing import Any

from ..errors import EdjeError
from .gate import LIMIT, GateOptions, GateResult, run_gate, usable_core_numbers
from .gate_trees import Tree, Trees, lay_out
from .gate_turns import launch
from .harness import (
    ROOT,
    Progress,
    command_line,
    conditions,
    has_settled,
    run_benchmark,
    write_result,
)
from .report import folded

NO_OP = "no-op"
APART = ("pipeline",)
COMMENT = ("# A comment: nothing else changes.",)
TIMED_LOOPS, LOOP_LENGTH = 300, 20_000
NUM_CALIBRATING, MOST_CALIBRATING = 3, 12  # launches: of a stage's time counts the least


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


Run = dict[str, Any]  # of the gate, as `_run` gives it and the JSON keeps it


@dataclass(frozen=True, slots=True)
class Trial:
    """What is asked for.

    Attributes:
        kinds: of `PLANTS`, and `NO_OP`.
        repeats: runs of the gate for each kind.
        minutes: after which no further run begins.
        slowdown: that is planted (0.1: 10 %).
        keep: called with the result so far after every run.
    """

    kinds: Sequence[str]
    repeats: int
    minutes: float
    slowdown: float
    keep: Callable[[Mapping[str, Any]], None]


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


def measure(asked: Trial, runs: list[Run], scratch: Path, progress: Progress) -> dict[str, Any]:
    """Plant each kind in turn, run the gate, count what it said.

    Args:
        runs: of an earlier trial, each counting as a repeat of its kind; what is run is added.
    """
    options = GateOptions(cores=usable_core_numbers())
    work = scratch.absolute() / "trees"
    trees = lay_out(ROOT, work, "HEAD")
    clean = {}
    for name, plant in PLANTS.items():
        clean[name] = (trees.head.package / plant.file).read_text(encoding="utf-8")
        (trees.base.package / plant.file).write_text(clean[name], encoding="utf-8")
    progress("taking the stages' times")
    loops = loops_of(asked.slowdown, stage_times(trees, options, work))
    until = monotonic() + 60 * asked.minutes
    for number in range(asked.repeats):
        for group in groups_of(asked.kinds):
            done = min(sum(run["kind"] == kind for run in runs) for kind in group)
            if done > number or monotonic() >= until:
                continue
            for name, plant in PLANTS.items():
                lines = loops[name] if name in group else COMMENT if group == [NO_OP] else ()
                _write(trees.head, plant, planted(clean[name], plant.function, lines))
            chosen = tuple(PLANTS[name].stage for name in group if name in PLANTS)
            some = replace(options, stages=chosen, counters=False) if chosen else options
            result, load = run_gate(trees, some, lambda line: None), round(os.getloadavg()[0], 1)
            runs += [_run(kind, result, load) for kind in group]
            said = ", ".join(f"{kind} {_score(kind, runs)}" for kind in group)
            seconds = f"{result.seconds:.0f} s, load {load}"
            progress(f"repeat {number + 1} of {asked.repeats}: {said} as expected ({seconds})")
            asked.keep(result_of(asked, runs))
    return result_of(asked, runs)


def stage_times(trees: Trees, options: GateOptions, work: Path) -> dict[str, float]:
    """Return the least seconds of the stage of every plant, once two launches agree on each."""
    taken: dict[str, list[float]] = {name: [] for name in PLANTS}
    stages = [plant.stage for plant in PLANTS.values()]
    for number in range(MOST_CALIBRATING):
        if number >= NUM_CALIBRATING and all(map(has_settled, taken.values())):
            break
        launched = launch(trees, options.settings(stages, number), work, number=number).stages
        for name, plant in PLANTS.items():
            taken[name].append(launched[plant.stage].base_s)
    return {name: min(seconds) for name, seconds in taken.items()}


def loops_of(slowdown: float, times: Mapping[str, float]) -> dict[str, Sequence[str]]:
    """Return the lines of every plant: a loop that takes `slowdown` of its stage's time."""
    turns = {name: turns_of(slowdown * time * 1e9) for name, time in times.items()}
    return {name: (f"for _ in range({number}):", "    pass") for name, number in turns.items()}


def groups_of(kinds: Sequence[str]) -> list[list[str]]:
    """Return what is planted together."""
    together = [kind for kind in kinds if kind in PLANTS and kind not in APART]
    alone = [[kind] for kind in kinds if kind in APART or kind == NO_OP]
    return [group for group in (together, *alone) if group]


def result_of(asked: Trial, runs: Sequence[Run]) -> dict[str, Any]:
    """Return all runs so far, a row for every kind, and what did not go as expected."""
    rows = [_row(kind, runs) for kind in asked.kinds if any(run["kind"] == kind for run in runs)]
    loads = [run["load"] for run in runs]
    spread = [min(loads, default=0.0), max(loads, default=0.0)]
    where = conditions(slowdown=asked.slowdown, limit=LIMIT, repeats=asked.repeats, loads=spread)
    return {
        "conditions": where,
        "rows": rows,
        "runs": list(runs),
        "faults": faults_of(rows, asked.repeats),
    }


def earlier_runs(path: Path, slowdown: float) -> list[Run]:
    """Return the runs of a trial that was interrupted, none where there is none.

    Raises:
        EdjeError: it was one of another commit, another slowdown or another machine.
    """
    if not path.exists():
        return []
    kept = json.loads(path.read_text(encoding="utf-8"))["result"]
    then, now = kept["conditions"], conditions(slowdown=slowdown)
    faults = [
        f"{name}: {then[name]}, here {now[name]}"
        for name in ("commit", "cpu", "cores", "slowdown")
        if then[name] != now[name]
    ]
    if faults:
        hint = "leave --resume out, or give another --name"
        raise EdjeError(f"{path} is of another trial", faults=faults, hint=hint)
    runs: list[Run] = kept["runs"]
    return runs


def _write(tree: Tree, plant: Plant, text: str) -> None:
    (tree.package / plant.file).write_text(text, encoding="utf-8")


def _run(kind: str, result: GateResult, load: float) -> Run:
    """Return what one run of the gate said of a kind: its stage, or of all for the no-op."""
    stage = PLANTS[kind].stage if kind in PLANTS else ""
    measured = [one for name, one in result.first.items() if name == (stage or name)]
    return {
        "kind": kind,
        "failing": [
            f"{one.benchmark} {one.field}"
            for one in result.verdicts
            if one.fails and one.benchmark == (stage or one.benchmark)
        ],
        "ratios": [round(found.estimate("wall").ratio, 4) for found in measured],
        "sees": [round(found.estimate("wall").sees(LIMIT), 4) for found in measured],
        "launches": [len(found.launches) for found in measured],
        "seconds": round(result.seconds, 1),
        "load": load,
    }


def _score(kind: str, runs: Sequence[Run]) -> str:
    """Return how many of a kind's runs went as expected: `3 of 3`."""
    own = [run for run in runs if run["kind"] == kind]
    good = sum(bool(run["failing"]) == (kind in PLANTS) for run in own)
    return f"{good} of {len(own)}"


def _row(kind: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Return how often a kind failed, and what was measured of it."""
    own = [run for run in runs if run["kind"] == kind]
    return {
        "kind": kind,
        "stage": PLANTS[kind].stage if kind in PLANTS else "all",
        "repeats": len(own),
        "failed": sum(bool(run["failing"]) for run in own),
        "expected": len(own) if kind in PLANTS else 0,
        "ratios": [ratio for run in own for ratio in run["ratios"]],
        "seconds_per_gate": round(fmean(run["seconds"] for run in own), 1),
    }


def faults_of(rows: Sequence[Mapping[str, Any]], repeats: int) -> list[str]:
    """Return a sentence for each kind that did not go as expected, or was not done so often."""
    wrong = [
        f"{row['kind']}: {row['failed']} of {row['repeats']} failed, expected {row['expected']}"
        for row in rows
        if row["failed"] != row["expected"]
    ]
    short = [
        f"{row['kind']}: {row['repeats']} of {repeats} repeats were done"
        for row in rows
        if row["repeats"] < repeats
    ]
    return wrong + short


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
    parser.add_argument("--minutes", type=float, default=600.0, help="no further run after")
    parser.add_argument("--resume", action="store_true", help="go on with the JSON in OUT")
    options = parser.parse_args(arguments)
    chosen = options.kinds.split(",")
    unknown = [kind for kind in chosen if kind not in kinds]
    if unknown:
        parser.error(f"no kind is called {', '.join(unknown)}, expected {', '.join(kinds)}")
    slowdown = options.slowdown / 100

    def keep(result: Mapping[str, Any]) -> None:
        write_result(options.name, folded(options.name, result), options.out)

    def run(scratch: Path, progress: Progress) -> dict[str, Any]:
        path = options.out / f"{options.name}.json"
        runs = earlier_runs(path, slowdown) if options.resume else []
        asked = Trial(chosen, options.repeats, options.minutes, slowdown, keep)
        return measure(asked, runs, scratch, progress)

    return run_benchmark(options, run, summary)


if __name__ == "__main__":
    sys.exit(main())
