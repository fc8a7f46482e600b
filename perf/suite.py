"""`make bench`: every figure that is promised, in under ten minutes on two cores.

Parts come one after the other, each with its share of the time (`perf/PLAN.md`); engines are built
once and shared by all of them. What is left is said before each part.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any

from ..engines.manifest import MANIFEST
from ..errors import EdjeError
from ..show import note, progress_steps
from . import bench_cascade
from .charts import draw_stages, draw_sweep
from .cold import measure_cold
from .measure import print_result, run_stages, run_sweep
from .random_model import CACHE, full_size_bundle, source_hash
from .report import folded, write_result
from .subjects import AUTO, build_all, engines_folder

FLAT = 0.10  # by how much a pair may cost more than where it costs least
NUM_QUERIES = 32
STAGE_CANDIDATES = 128
IMAGES, IMAGE_CANDIDATES = (10_000, 100_000, 1_000_000, 10_000_000), 250
CANDIDATES = (100, 1_000, 50_000)

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the suite.

    Attributes:
        seconds: that it takes on two quiet cores, its engines built.
        measure: returns its result, given the folder of all results.
        draw: draws the result; None: it has no chart.
        prints: whether the result is still to be printed and written.
    """

    seconds: int
    measure: Callable[[Path], Result]
    draw: Callable[[Result, Path], Path] | None = None
    prints: bool = True


def run_suite(out: Path, parts: list[str]) -> list[str]:
    """Measure the parts (empty: all), print and write each; return what fell short.

    Raises:
        EdjeError: something cannot be measured, or gave a wrong result.
    """
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        raise EdjeError(f"no part is called {', '.join(unknown)}, expected {', '.join(PARTS)}")
    chosen = {name: part for name, part in PARTS.items() if not parts or name in parts}
    faults: list[str] = []
    began = monotonic()
    note(f"engines: {spell(ENGINE_SECONDS)} the first time, kept in {CACHE}")
    scorer(), demo()
    for name, part in chosen.items():
        note(said_before(name, list(chosen), monotonic() - began))
        result = part.measure(out)
        faults += [f"{name}: {fault}" for fault in result.get("faults", [])]
        if part.prints:
            print_result(result)
            note(f"written to {write_result(name, result, out)}")
        if part.draw is not None:
            note(f"drawn into {part.draw(result, out / f'{name}.svg')}")
    note(f"all of it took {spell(monotonic() - began)}")
    return faults


def said_before(name: str, chosen: list[str], gone: float) -> str:
    """Return the line before a part: what it takes, and what is left with it."""
    at = chosen.index(name)
    left = sum(PARTS[one].seconds for one in chosen[at:])
    return (
        f"[{at + 1} of {len(chosen)}] {name}, about {spell(PARTS[name].seconds)}; "
        f"{spell(gone)} gone, about {spell(left)} left"
    )


def spell(seconds: float) -> str:
    """Return minutes and seconds: 3:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


@cache
def scorer() -> Path:
    """Return the full-size random scorer's engine, as `auto` chose it: built once for all parts."""
    with progress_steps("engines") as progress:
        progress("exporting the full-size scorer")
        bundle = full_size_bundle()
        return build_all(bundle, engines_folder(bundle), progress) / AUTO


@cache
def demo() -> Path:
    """Return the folder of the demo's scorer with `precise` and `fast` engines, made once.

    Trained weights: on random ones no margin would mean anything.
    """
    folder = CACHE / f"demo-{source_hash('demo')}-{source_hash('engines')}"
    with progress_steps("engines") as progress:
        if not folder.exists():
            progress("drawing, exporting and indexing the demo")
            bench_cascade.write_demo(folder)
        if not all((folder / name / MANIFEST).exists() for name in ("precise", "fast")):
            queries = bench_cascade.test_queries(folder, NUM_QUERIES, progress)
            bench_cascade.build_both(folder, queries, folder, progress)
    return folder


def measure_stages_of_a_ranking(out: Path) -> Result:
    """Measure every stage of a ranking with the full-size scorer, in batches of 128."""
    return run_stages(scorer(), seconds=2.5, candidates=STAGE_CANDIDATES)


def measure_peers(out: Path) -> Result:
    """Run `edje bench peers` in a process of its own: PyTorch's threads end with it.

    Raises:
        EdjeError: it could not measure.
    """
    words = ["bench", "peers", "--out", str(out), "--seconds", str(CONTEST_SECONDS)]
    sys.stdout.flush()
    done = subprocess.run([sys.executable, "-m", "edje", *words], check=False)
    if done.returncode not in (0, 1):
        raise EdjeError(f"edje {' '.join(words)} ended with {done.returncode}")
    result: Result = json.loads((out / "peers.json").read_text(encoding="utf-8"))
    return result


def measure_candidates(out: Path) -> Result:
    """Measure what a pair costs over candidates, with the demo's int8 engine.

    It takes a tenth of the full-size scorer's time, so what is ours weighs ten times as much: what
    is flat here is flat there. The longest run once: disturbances even out over it.
    """
    given: dict[str, Any] = {"seconds": 4.0, "least_rounds": 1, "only": ["rank"], "roof": False}
    result = run_sweep(demo() / "fast", "candidates", CANDIDATES, **given)
    return {**result, "faults": uneven(result, "rank", "candidates")}


def measure_images(out: Path) -> Result:
    """Measure what a pair costs over images in the store, with the full-size scorer."""
    given: dict[str, Any] = {"seconds": 3.0, "candidates": IMAGE_CANDIDATES, "roof": False}
    result = run_sweep(scorer(), "images", IMAGES, only=["resolve", "read", "rank"], **given)
    return {**result, "faults": uneven(result, "rank", "images")}


def uneven(result: Result, stage: str, over: str) -> list[str]:
    """Return in one sentence how a pair's cost moves, where it moves by more than `FLAT`."""
    costs = {
        one["extra_info"]["us_per_pair"]: one["params"][over]
        for one in result["benchmarks"]
        if one["name"] == stage
    }
    least, most = min(costs), max(costs)
    if most <= least * (1 + FLAT):
        return []
    return [
        f"{stage} costs {least:,.1f} us a pair at {costs[least]:,} {over} and {most:,.1f} at "
        f"{costs[most]:,}, expected {FLAT:.0%} at most between"
    ]


def measure_top10(out: Path) -> Result:
    """Rank the demo's queries over 1,000 candidates with the cascade and without, in turns."""
    folder = demo()
    with progress_steps("top10") as progress:
        queries = bench_cascade.test_queries(folder, NUM_QUERIES, progress)
        both = (folder / "precise", folder / "fast")
        result = bench_cascade.measure(queries, folder / "scenes.store", *both, progress)
    return folded("top10", result)


ENGINE_SECONDS = 75
CONTEST_SECONDS = 60  # of each text length, after which no round begins
PARTS: Mapping[str, Part] = {
    "peers": Part(250, measure_peers, prints=False),
    "stages": Part(30, measure_stages_of_a_ranking, draw_stages),
    "candidates": Part(25, measure_candidates, draw_sweep),
    "images": Part(50, measure_images, draw_sweep),
    "top10": Part(30, measure_top10),
    "cold": Part(15, lambda out: measure_cold(scorer())),
}
