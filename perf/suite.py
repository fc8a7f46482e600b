"""What `make bench` measures beside the peers: cost a pair, top 10 with a cascade, a cold start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..demo.guide import run_demo
from ..errors import EdjeError
from ..show import note, progress_steps
from . import bench_cascade
from .charts import draw_stages, draw_sweep
from .cold import measure_cold
from .measure import print_result, run_stages, run_sweep, scratch_folder
from .random_model import CACHE, source_hash
from .report import folded, write_result

SWEEPS: Mapping[str, Mapping[str, Any]] = {
    # The longest run once: it takes two minutes, over which disturbances even out.
    "candidates": {"values": (100, 1_000, 10_000, 50_000), "least_rounds": 1, "seconds": 4.0},
    "images": {
        "values": (10_000, 100_000, 1_000_000, 10_000_000),
        "seconds": 8.0,
        "candidates": 250,  # a batch, so that there is time for many runs
    },
}
FLAT = 0.10  # by how much a pair may cost more than where it costs least
NUM_QUERIES = 48
STAGE_CANDIDATES = 128


def run_suite(out: Path, parts: list[str]) -> list[str]:
    """Measure the parts (empty: all), print and write each; return what fell short.

    Raises:
        EdjeError: something cannot be measured, or gave a wrong result.
    """
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        raise EdjeError(f"no part is called {', '.join(unknown)}, expected {', '.join(PARTS)}")
    faults: list[str] = []
    for name, measure in PARTS.items():
        if parts and name not in parts:
            continue
        result = measure()
        print_result(result)
        faults += [f"{name}: {fault}" for fault in result.get("faults", [])]
        note(f"written to {write_result(name, result, out)}")
        if name in DRAWN:
            note(f"drawn into {DRAWN[name](result, out / f'{name}.svg')}")
    return faults


def measure_stages_of_a_ranking() -> dict[str, Any]:
    """Measure every stage of a ranking with the full-size scorer, in batches of 128."""
    return run_stages(None, seconds=4.0, candidates=STAGE_CANDIDATES)


def measure_flat(over: str) -> dict[str, Any]:
    """Measure what a pair costs in the whole ranking over candidates, or over images."""
    given = dict(SWEEPS[over])
    only = ["rank"] if over == "candidates" else ["resolve", "read", "rank"]
    result = run_sweep(None, over, given.pop("values"), only=only, **given)
    return {**result, "faults": uneven(result, "rank", over)}


def uneven(result: Mapping[str, Any], stage: str, over: str) -> list[str]:
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


def measure_top10() -> dict[str, Any]:
    """Rank the demo's queries over 1,000 candidates with the cascade and without, in turns.

    The demo's trained model: on random weights no margin would mean anything.
    """
    demo = CACHE / f"demo-{source_hash('demo')}"
    if not (demo / "demo.json").exists():
        run_demo(demo)
    with scratch_folder() as scratch, progress_steps("top10") as progress:
        result = bench_cascade.measure_demo(demo, NUM_QUERIES, scratch, progress)
    return folded("top10", result)


PARTS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "stages": measure_stages_of_a_ranking,
    "candidates": lambda: measure_flat("candidates"),
    "images": lambda: measure_flat("images"),
    "top10": measure_top10,
    "cold": measure_cold,
}
DRAWN = {"stages": draw_stages, "candidates": draw_sweep, "images": draw_sweep}
