"""The frame of every benchmark: turns in one process, minima, conditions, one command, one JSON.

A loaded or throttling machine slows whoever runs at the moment. Taking turns gives everybody the
same share of the bad moments, and the minimum is the run that was disturbed least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from itertools import cycle
from math import inf
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .. import __version__
from ..arrays import Float32
from ..errors import EdjeError
from ..machine import cpu_features, cpu_model, usable_cores

if TYPE_CHECKING:
    from ..runtime.reranker import Reranker

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SCRATCH = Path(".cache") / "perf"  # git ignores it: a trial run never touches the kept results
SETTLED, LEAST_TO_SETTLE = 0.01, 2  # how far the two smallest times may lie apart; runs
LIBRARIES = ("numpy", "onnxruntime", "openvino", "tokenizers", "torch", "transformers")

Item = TypeVar("Item")
Progress = Callable[[str], None]  # called with a line that says what is being done


@dataclass(frozen=True, slots=True)
class Timing:
    """What one contestant took.

    Attributes:
        name: whose.
        pairs: pairs one run scores.
        min_ms, median_ms: wall time of a run.
        min_cpu_ms: CPU time of a run, all threads: on a loaded machine it moves less.
        pairs_per_s: pairs over the least wall time.
        num_runs: runs measured.
        wall_ms, cpu_ms: of every run, in their order.
    """

    name: str
    pairs: int
    min_ms: float
    median_ms: float
    min_cpu_ms: float
    pairs_per_s: float
    num_runs: int
    wall_ms: Sequence[float] = field(default=(), repr=False)
    cpu_ms: Sequence[float] = field(default=(), repr=False)

    def facts(self) -> dict[str, Any]:
        """Return all fields but the single runs."""
        return {k: v for k, v in asdict(self).items() if k not in ("wall_ms", "cpu_ms")}

    @classmethod
    def of(cls, name: str, pairs: int, times: Times) -> Timing:
        """Sum up the runs of one contestant, `pairs` each."""
        least = min(times.wall_ms)
        return cls(
            name=name,
            pairs=pairs,
            min_ms=round(least, 3),
            median_ms=round(median(times.wall_ms), 3),
            min_cpu_ms=round(min(times.cpu_ms), 3),
            pairs_per_s=round(pairs / least * 1e3, 3),
            num_runs=len(times.wall_ms),
            wall_ms=times.wall_ms,
            cpu_ms=times.cpu_ms,
        )


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of a contestant's runs in their order: wall, and CPU time of all threads."""

    wall_ms: list[float]
    cpu_ms: list[float]


def take_turns(
    contestants: Mapping[str, Callable[[], object]], num_rounds: int, *, first: int = 0
) -> dict[str, Times]:
    """Run `num_rounds` rounds in which every contestant runs once. They must be warm already.

    Every round starts with another contestant, so that none always follows the same one; the first
    one with number `first`.
    """
    if num_rounds < 1:
        raise EdjeError(f"num_rounds is {num_rounds}, expected 1 or more")
    names = list(contestants)
    times = {name: Times([], []) for name in names}
    for round_index in range(first, first + num_rounds):
        start = round_index % len(names)
        for name in names[start:] + names[:start]:
            cpu, began = process_time(), perf_counter()
            contestants[name]()
            times[name].wall_ms.append((perf_counter() - began) * 1e3)
            times[name].cpu_ms.append((process_time() - cpu) * 1e3)
    return times


def settle(
    contestants: Mapping[str, Callable[[], object]],
    *,
    most: int,
    seconds: float = inf,
    once: Collection[str] = (),
    together: Sequence[Collection[str]] = (),
) -> dict[str, Times]:
    """Run rounds as `take_turns`, in which only those take part whose minimum has not settled.

    Args:
        most: rounds at most; two are run at least.
        seconds: after which no further round begins, but for the second.
        once: names of those that run in the first round only.
        together: sets of names that are compared to a percent: all of a set take equally many
            turns, until the last has settled, twice `most` and half as many `seconds` more at most.
    """
    began, left = perf_counter(), dict(contestants)
    times = {name: Times([], []) for name in left}
    number = 0
    while left:
        for name, took in take_turns(left, 1, first=number).items():
            times[name].wall_ms.extend(took.wall_ms)
            times[name].cpu_ms.extend(took.cpu_ms)
        number += 1
        spent = perf_counter() - began if number >= LEAST_TO_SETTLE else 0.0
        open_ = {name for name in left if name not in once and not has_settled(times[name].wall_ms)}
        kept = set(open_) if number < most and spent < seconds else set()
        if number < 2 * most and spent < 1.5 * seconds:
            kept.update(*(names for names in together if open_.intersection(names)))
        left = {name: run for name, run in left.items() if name in kept}
    return times


def has_settled(taken: Sequence[float]) -> bool:
    """Tell whether the two smallest of some times agree to 1 %: a third would be no surprise."""
    if len(taken) < LEAST_TO_SETTLE:
        return False
    least, second = sorted(taken)[:2]
    return second <= least * (1 + SETTLED)


def interleave(
    contestants: Mapping[str, Callable[[], object]], *, pairs: int, num_rounds: int
) -> dict[str, Timing]:
    """Let the contestants take turns; return what each took for its `pairs`."""
    times = take_turns(contestants, num_rounds)
    return {name: Timing.of(name, pairs, own) for name, own in times.items()}


def in_turn(
    run: Callable[[Item], object], items: Sequence[Item], first: int = 0
) -> Callable[[], object]:
    """Return what runs one item after the other, beginning with number `first`, round and round."""
    turns = cycle([*items[first:], *items[:first]])
    return lambda: run(next(turns))


def speedup(fast: Timing, slow: Timing) -> float:
    """Return how many times the pairs/s of `slow` the contestant `fast` reaches."""
    return fast.pairs_per_s / slow.pairs_per_s


def conditions(**more: Any) -> dict[str, Any]:
    """Return what a figure depends on: machine, versions, commit, load, and `more`."""
    return {
        "cpu": cpu_model(),
        "cpu_features": list(cpu_features()),
        "cores": usable_cores(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {"edje-runtime": __version__, **versions(LIBRARIES)},
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **more,
    }


def conditions_line(where: Mapping[str, Any], *names: str) -> str:
    """Return the conditions that stand below every summary, with those of `names`, in brackets."""
    more = "".join(f"{name.replace('_', ' ')} {where[name]}, " for name in names)
    return (
        f"({where['cpu']}, {where['cores']} cores, {more}"
        f"load {where['load_average'][0]}, commit {where['commit']})"
    )


def command_line(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of `edje bench <name>`, with how its JSON is called and where it goes."""
    parser = argparse.ArgumentParser(
        prog=f"edje bench {name.replace('_', '-')}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--name", default=name, help="of the JSON file")
    parser.add_argument(
        "--out",
        type=Path,
        default=SCRATCH,
        help=f"folder of the JSON; default: {SCRATCH}; perf/results keeps it",
    )
    return parser


def run_benchmark(
    options: argparse.Namespace,
    measure: Callable[[Path, Progress], dict[str, Any]],
    summary: Callable[[Mapping[str, Any]], str],
) -> int:
    """Measure in a scratch folder, print the summary, write the JSON; return the exit status.

    It is 1 where the result has `faults` or is `broken`, 2 where nothing could be measured.
    """
    cache = ROOT / ".cache"  # a disk, which the system's temporary folder need not be
    cache.mkdir(exist_ok=True)
    try:
        with TemporaryDirectory(dir=cache) as scratch:
            result = measure(Path(scratch), lambda line: print(f"... {line}", flush=True))
    except EdjeError as error:
        print(error, file=sys.stderr)
        return 2
    from .report import folded  # which stands on this module

    print(summary(result))
    whole = result if "benchmarks" in result else folded(options.name, result)
    print(f"written to {write_result(options.name, whole, options.out)}")
    return 1 if result.get("faults") or result.get("broken") else 0


def run_rounds(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    num_rounds: int,
    measure: Callable[[int, Path], dict[str, Any]],
    summary: Callable[[Mapping[str, Any]], str],
) -> int:
    """As `run_benchmark`, of `measure(rounds, scratch)`, with `--rounds` among the arguments."""
    told = f"turns of everybody; default: {num_rounds}"
    parser.add_argument("--rounds", type=int, default=num_rounds, help=told)
    options = parser.parse_args(arguments)
    return run_benchmark(
        options, lambda scratch, progress: measure(options.rounds, scratch), summary
    )


def scores_in_order(
    reranker: Reranker, query: str, candidates: Sequence[str] | None = None
) -> Float32:
    """Return the score of every candidate (None: of the whole store) in their order: float32 [N].

    Raises:
        EdjeError: a candidate has no score.
    """
    result = reranker.rank(query, candidates)
    if result.errors:
        raise EdjeError(f"{len(result.errors)} candidates of {query!r} have no score")
    scores = np.empty(len(result), np.float32)
    for hit in result:
        scores[hit.index] = hit.score
    return scores


def write_result(name: str, values: Mapping[str, Any], folder: Path) -> Path:
    """Write `values` as `folder/name.json`; return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


def timings_json(timings: Mapping[str, Timing]) -> list[dict[str, Any]]:
    """Return the timings as plain JSON values; `report.folded` makes benchmarks of their runs."""
    return [asdict(timing) for timing in timings.values()]


def timings_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return timings, as their JSON holds them, as aligned lines of text."""
    width = max(len(row["name"]) for row in rows)
    head = f"{'':{width}}  {'pairs/s':>9}  {'min ms':>9}  {'median ms':>9}  {'CPU ms':>9}"
    lines = [
        f"{row['name']:{width}}  {row['pairs_per_s']:9.1f}  {row['min_ms']:9.1f}"
        f"  {row['median_ms']:9.1f}  {row['min_cpu_ms']:9.1f}"
        for row in rows
    ]
    return "\n".join([head, *lines])


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """Return the installed version of every distribution, None where it is not there."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the checkout's commit, with `+` where files differ from it; None outside git."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + "+" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def commit_facts() -> dict[str, Any]:
    """Return the checkout's commit as pytest-benchmark keeps one; `id` None outside git."""
    facts: dict[str, Any] = {"id": _commit(), "time": None, "branch": None, "dirty": False}
    if facts["id"] is not None:
        facts["dirty"] = facts["id"].endswith("+")
        facts["time"] = _git("show", "-s", "--format=%cI", "HEAD")
        facts["branch"] = _git("rev-parse", "--abbrev-ref", "HEAD")
    return {**facts, "project": "edje-runtime"}


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()
