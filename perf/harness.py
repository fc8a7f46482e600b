"""Compare in one process, interleaved; report ratios of minima, with every condition.

A loaded or throttling machine slows whoever runs at the moment. Taking turns gives everybody the
same share of the bad moments, and the minimum is the run that was disturbed least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

from .. import __version__
from ..errors import EdjeError
from ..machine import cpu_features, cpu_model, usable_cores

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SCRATCH = Path(".cache") / "perf"  # git ignores it: a trial run never touches the kept results
LIBRARIES = (
    "numpy",
    "onnxruntime",
    "openvino",
    "tokenizers",
    "torch",
    "transformers",
)


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
    """

    name: str
    pairs: int
    min_ms: float
    median_ms: float
    min_cpu_ms: float
    pairs_per_s: float
    num_runs: int


def interleave(
    contestants: Mapping[str, Callable[[], object]], *, pairs: int, num_rounds: int
) -> dict[str, Timing]:
    """Time `num_rounds` rounds in which every contestant runs once. They must be warm already.

    Every round starts with another contestant, so that none always follows the same one.
    """
    if num_rounds < 1:
        raise EdjeError(f"num_rounds is {num_rounds}, expected 1 or more")
    names = list(contestants)
    walls: dict[str, list[float]] = {name: [] for name in names}
    cpus: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(num_rounds):
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            cpu, began = process_time(), perf_counter()
            contestants[name]()
            walls[name].append((perf_counter() - began) * 1e3)
            cpus[name].append((process_time() - cpu) * 1e3)
    return {name: _timing(name, pairs, walls[name], cpus[name]) for name in names}


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
        "versions": {"edje-runtime": __version__, **{name: _version(name) for name in LIBRARIES}},
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **more,
    }


def add_out_option(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark its `--out`: the folder that its JSON is written to."""
    parser.add_argument(
        "--out",
        type=Path,
        default=SCRATCH,
        help=f"folder of the JSON; default: {SCRATCH}; perf/results keeps it",
    )


def write_result(name: str, values: Mapping[str, Any], folder: Path) -> Path:
    """Write `values` as `folder/name.json`; return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


def table(timings: Mapping[str, Timing]) -> str:
    """Return the timings as aligned lines of text."""
    width = max(len(name) for name in timings)
    head = f"{'':{width}}  {'pairs/s':>9}  {'min ms':>9}  {'median ms':>9}  {'CPU ms':>9}"
    rows = [
        f"{t.name:{width}}  {t.pairs_per_s:9.1f}  {t.min_ms:9.1f}  {t.median_ms:9.1f}"
        f"  {t.min_cpu_ms:9.1f}"
        for t in timings.values()
    ]
    return "\n".join([head, *rows])


def timings_json(timings: Mapping[str, Timing]) -> list[dict[str, Any]]:
    """Return the timings as plain JSON values."""
    return [asdict(timing) for timing in timings.values()]


def _timing(name: str, pairs: int, walls: list[float], cpus: list[float]) -> Timing:
    least = min(walls)
    return Timing(
        name=name,
        pairs=pairs,
        min_ms=round(least, 3),
        median_ms=round(median(walls), 3),
        min_cpu_ms=round(min(cpus), 3),
        pairs_per_s=round(pairs / least * 1e3, 3),
        num_runs=len(walls),
    )


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


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()
