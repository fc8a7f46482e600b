"""The gate: is this checkout slower than the commit it comes from? Both run here, side by side.

    make perf-gate BASE=origin/main

Each stage is run by both sides in turns (`gate_turns.py`) until the ratio of minima says on which
side of the limit it lies (`gate_statistics.py`). What is slower is measured once more, from new
processes on, and where that disagrees a third time: it fails if two say so. Beside the times stand
exact counters (`counters.py`), which no load of the machine moves: any increase fails.

Exit codes: 0 no regression, 1 a regression or a stage that the head lacks, 2 cannot compare.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from ..errors import EdjeError
from ..show import progress_steps
from .gate_judging import (
    Measurement,
    Ranges,
    counter_verdicts,
    joined,
    missing_stages,
    telling,
    time_verdicts,
)
from .gate_statistics import MAX_LAUNCHES
from .gate_trees import Trees, lay_out
from .gate_turns import NUM_ROUNDS, count, launch
from .gate_worker import Settings
from .harness import ROOT, Progress, write_result
from .report import Measured, benchmark_json, summary
from .verdicts import (
    ExitCode,
    Verdict,
    exit_code,
    print_verdicts,
    write_error,
    write_reports,
)

# `upload`, `download` and `forward` show with an engine only.
STAGES = ("tokenise", "resolve", "read", "enqueue", "sort", "rank", "serve")
ENGINE_STAGES = ("tokenise", "resolve", "read", "upload", "forward", "download", "rank", "serve")
LIMIT = 0.05
NUM_COUNTED = 5  # runs


@dataclass(frozen=True, slots=True)
class GateOptions:
    """What is gated, and how.

    Attributes:
        stages: their names, as `open_stages` has them.
        limit: slowdown from which on a stage fails (0.05: 5 %).
        allowed: increase of counters that does not fail, by `stage.counter` (0.02: 2 %).
        engine: folder of an engine; None: one that takes no time, so that what is ours shows.
        candidates, batch, images, wordpieces: small ones, so that a run is short.
        cores: that the processes are pinned to, one a launch, in turns; none: all, not pinned.
        counters: whether the counters are gated, too.
        rounds: of a launch.
        max_launches: after which the mean decides.
    """

    stages: Collection[str] = STAGES
    limit: float = LIMIT
    allowed: Mapping[str, float] = field(default_factory=dict)
    engine: Path | None = None
    candidates: int = 256
    batch: int = 64
    images: int = 256
    wordpieces: int = 13
    cores: Sequence[int] = ()
    counters: bool = True
    rounds: int = NUM_ROUNDS
    max_launches: int = MAX_LAUNCHES

    @classmethod
    def of(
        cls,
        *,
        stages: Collection[str] = (),
        limit: float = LIMIT,
        allowed: Sequence[str] = (),
        engine: Path | None = None,
        candidates: int = 256,
        pinned: bool = True,
    ) -> GateOptions:
        """Make options of what a command line says.

        Args:
            stages: none: all.
            allowed: `[STAGE.]COUNTER=PERCENT` each.

        Raises:
            EdjeError: something cannot be meant (all of it).
        """
        offered = ENGINE_STAGES if engine is not None else STAGES
        faults = [f"no stage is called {one}" for one in stages if one not in offered]
        if not 0 < limit < 10:
            faults.append(f"the limit is {limit:.1%}, expected more than 0 and less than 1000 %")
        shares = {}
        for text in allowed:
            name, _, percent = text.partition("=")
            try:
                shares[name] = float(percent) / 100
            except ValueError:
                faults.append(f"--allow {text!r}, expected [STAGE.]COUNTER=PERCENT")
        if faults:
            hint = f"stages are {', '.join(offered)}"
            raise EdjeError("the gate cannot run like this", faults=faults, hint=hint)
        return cls(
            stages=stages or offered,
            limit=limit,
            allowed=shares,
            engine=engine,
            candidates=candidates,
            batch=min(64, candidates),
            images=candidates,
            cores=usable_core_numbers() if pinned else (),
        )

    def settings(self, stages: Collection[str], number: int = 0) -> Settings:
        """Return what workers of launch `number` open."""
        core = [self.cores[number % len(self.cores)]] if self.cores else []
        engine = None if self.engine is None else str(self.engine.absolute())
        sizes = (self.candidates, self.batch, self.images, self.wordpieces)
        return Settings(sorted(stages), *sizes, "", engine, core, counting=False)


@dataclass(slots=True)
class GateResult:
    """What the gate found.

    Attributes:
        verdicts: of times, then of counters.
        first: the measurement of every stage.
        again: of what seemed slower, and of what seemed so in one of these two only.
        counters: of each side: [least, greatest] by stage and name.
        seconds: that all of it took.
    """

    verdicts: list[Verdict]
    first: dict[str, Measurement]
    again: list[dict[str, Measurement]]
    counters: dict[str, dict[str, Ranges]]
    seconds: float

    def to_json(self, trees: Trees, options: GateOptions) -> dict[str, Any]:
        """Return the head's figures in the form of all results, with what the gate says of them.

        Of a benchmark's counters those that were the same in every run: `edje bench compare` of two
        such files is exact in them.
        """
        where = {
            "limit": options.limit,
            "candidates": options.candidates,
            "pairs_per_batch": options.batch,
            "images": options.images,
            "wordpieces": options.wordpieces,
            "engine": None if options.engine is None else options.engine.name,
            "rounds": options.rounds,
            "cores": list(options.cores),
        }
        return benchmark_json(
            [self._measured(stage, found) for stage, found in self.first.items()],
            conditions=where,
            base=trees.base.commit,
            head=trees.head.commit,
            notes=list(trees.notes),
            seconds=round(self.seconds, 1),
            verdicts=[verdict.to_json() for verdict in self.verdicts],
            launches=_launches_json(self.first),
            confirming_launches=[_launches_json(each) for each in self.again],
            counters=self.counters,
        )

    def _measured(self, stage: str, found: Measurement) -> Measured:
        """Return the head's launches of a stage as one benchmark."""
        counters = self.counters["head"].get(stage, {})
        return Measured(
            stage,
            "gate",
            [one.head_s for one in found.launches],
            pairs=found.launches[0].pairs,
            cpu_seconds=[one.head_cpu_s for one in found.launches],
            counters={name: low for name, (low, high) in counters.items() if low == high},
        )


def gate_checkout(
    ref: str | None,
    options: GateOptions,
    *,
    name: str,
    out: Path,
    markdown_file: Path | None = None,
    junit_file: Path | None = None,
) -> ExitCode:
    """Gate this checkout against a commit: print, write what is asked for, return how it ends.

    Args:
        ref: of the base; None: as `lay_out` chooses.
        name, out: of the JSON, and the folder that it goes to.
    """
    title, files = "perf gate", {"markdown_file": markdown_file, "junit_file": junit_file}
    try:
        trees = lay_out(ROOT, ROOT / ".cache" / "perf-gate", ref)
        with progress_steps(title) as progress:
            result = run_gate(trees, options, progress)
    except EdjeError as error:
        write_error(title, str(error), **files)
        print(f"edje: {error}", file=sys.stderr)
        return ExitCode.CANNOT_COMPARE
    values = result.to_json(trees, options)
    shown = telling(result.verdicts)
    about = {
        "base": trees.base.commit,
        "head": trees.head.commit,
        "machine": summary(values),
        "counters that did not move": len(result.verdicts) - len(shown),
        "took": f"{result.seconds:.0f} s",
        **{f"note {number}": note for number, note in enumerate(trees.notes, 1)},
    }
    write_reports(title, shown, about, **files)
    print_verdicts(f"head {trees.head.commit} against base {trees.base.commit}", shown)
    for fact, value in about.items():
        print(f"{fact}: {value}")
    print(f"written to {write_result(name, values, out)}")
    return exit_code(result.verdicts)


def run_gate(trees: Trees, options: GateOptions, progress: Progress) -> GateResult:
    """Measure, count, confirm; return what was found.

    Raises:
        EdjeError: a side cannot run, or gives something wrong.
    """
    began = monotonic()
    with TemporaryDirectory(prefix="run-", dir=trees.head.folder.parent) as folder:
        scratch = Path(folder).absolute()
        first, missing = measure(trees, options, options.stages, scratch, progress)
        counters: dict[str, dict[str, Ranges]] = {"base": {}, "head": {}}
        if options.counters:
            counters = count_both(trees, options, options.stages, scratch, progress)
        again: list[dict[str, Measurement]] = []
        slower = _slower(first, options)
        if slower:
            progress(f"{', '.join(slower)} seems slower: once more")
            found, _ = measure(trees, options, slower, scratch, progress, start=MAX_LAUNCHES)
            again.append(found)
        doubtful = [stage for stage in slower if stage not in _slower(again[0], options)]
        if doubtful:
            progress(f"{', '.join(doubtful)} did not seem slower again: a third time decides")
            found, _ = measure(trees, options, doubtful, scratch, progress, start=2 * MAX_LAUNCHES)
            again.append(found)
    verdicts = [
        *time_verdicts(first, again, options.limit, options.max_launches),
        *missing,
        *counter_verdicts(counters["base"], counters["head"], options.allowed),
    ]
    return GateResult(verdicts, first, again, counters, monotonic() - began)


def _slower(measured: Mapping[str, Measurement], options: GateOptions) -> list[str]:
    """Return the stages that seem slower."""
    limit, most = options.limit, options.max_launches
    return [stage for stage, one in measured.items() if one.decision(limit, most) == "slower"]


def count_both(
    trees: Trees,
    options: GateOptions,
    stages: Collection[str],
    scratch: Path,
    progress: Progress,
) -> dict[str, dict[str, Ranges]]:
    """Count both sides; where the head's counters are worse, once more, and take both ranges."""
    found: dict[str, dict[str, Ranges]] = {}
    for tree in (trees.base, trees.head):
        progress(f"counting what {tree.name} does")
        found[tree.name] = count(tree, options.settings(stages), scratch, NUM_COUNTED)
    verdicts = counter_verdicts(found["base"], found["head"], options.allowed)
    worse = {one.benchmark for one in verdicts if one.fails}
    for tree in (trees.base, trees.head) if worse else ():
        progress(f"{', '.join(sorted(worse))} counts more: {tree.name} once more")
        again = count(tree, options.settings(worse), scratch, NUM_COUNTED)
        for stage, ranges in again.items():
            found[tree.name][stage] = joined(found[tree.name][stage], ranges)
    return found


def measure(
    trees: Trees,
    options: GateOptions,
    stages: Collection[str],
    scratch: Path,
    progress: Progress,
    start: int = 0,
) -> tuple[dict[str, Measurement], list[Verdict]]:
    """Add launches until every stage is decided; return them, and what only one side has.

    `start`: number of the first one.
    """
    measured: dict[str, Measurement] = {}
    missing: list[Verdict] = []
    left, number = list(stages), start
    while left:
        progress(f"launch {number - start + 1}: {', '.join(left)}")
        settings = options.settings(left, number)
        launched = launch(trees, settings, scratch, number=number, rounds=options.rounds)
        for stage, one in launched.stages.items():
            measured.setdefault(stage, Measurement()).launches.append(one)
        missing += missing_stages(launched)
        number += 1
        left = [
            stage
            for stage in left
            if stage in measured
            and measured[stage].decision(options.limit, options.max_launches) == "open"
        ]
    return measured, missing


def usable_core_numbers() -> list[int]:
    """Return the cores that this process may run on; none where the system does not pin."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _launches_json(measured: Mapping[str, Measurement]) -> dict[str, Any]:
    return {
        stage: [{**asdict(one), "wall": one.wall, "cpu": one.cpu} for one in found.launches]
        for stage, found in measured.items()
    }
