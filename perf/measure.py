"""Every stage of a ranking in turns in one process, as `edje bench run` measures and tells it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

from ..engines.manifest import EngineManifest
from ..show import note, print_table, progress_bar, progress_steps
from .harness import ROOT
from .report import Measured, benchmark_json, summary, write_result
from .stages import Stage, open_stages

GROUP = "stages"
LEAST_ROUNDS, MOST_ROUNDS = 5, 2000


def measure_stages(
    stages: Mapping[str, Stage],
    *,
    seconds: float,
    group: str = GROUP,
    params: Mapping[str, Any] | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> list[Measured]:
    """Run the stages in turns, each for about `seconds`; check what they give before and after.

    A stage that takes longer gets fewer turns, spread evenly over the same time.

    Raises:
        EdjeError: a result is wrong; nothing is reported then.
    """
    wanted = {name: _rounds(stage, seconds) for name, stage in stages.items()}
    total = max(wanted.values())
    wall: dict[str, list[float]] = {name: [] for name in stages}
    cpu: dict[str, list[float]] = {name: [] for name in stages}
    with progress_bar(f"measuring {', '.join(stages)}") as update:
        for turn in range(total):
            for name, stage in stages.items():
                if (turn + 1) * wanted[name] // total > turn * wanted[name] // total:
                    cpu_began, began = process_time(), perf_counter()
                    stage.run()
                    wall[name].append(perf_counter() - began)
                    cpu[name].append(process_time() - cpu_began)
            update(turn + 1, total)
    for stage in stages.values():
        stage.check()
    return [
        Measured(
            name,
            group,
            wall[name],
            pairs=stage.pairs,
            params=params or {},
            cpu_seconds=cpu[name],
            conditions=conditions or {},
        )
        for name, stage in stages.items()
    ]


def run_stages(
    engine: Path | None, *, seconds: float, name: str, out: Path, **setting: Any
) -> dict[str, Any]:
    """Open the stages, measure them, print the table, write the JSON; return it.

    Args:
        setting: as `open_stages` takes it.
    """
    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(dir=cache)))
        with progress_steps("bench") as progress:
            opening = open_stages(engine, scratch=scratch, progress=progress, **setting)
            stages = stack.enter_context(opening)
        measured = measure_stages(stages, seconds=seconds)
    kept = {key: value for key, value in setting.items() if key not in ("only", "store")}
    what = "the full-size random scorer" if engine is None else EngineManifest.read(engine).words
    result = benchmark_json(measured, conditions={"engine": what, **kept})
    print_result(result)
    note(f"written to {write_result(name, result, out)}")
    return result


def print_result(result: Mapping[str, Any]) -> None:
    """Write a table of all entries, and the conditions."""
    rows = [_row(entry) for entry in result["benchmarks"]]
    header = ("stage", "pairs", "pairs/s", "us a pair", "min ms", "p50", "p90", "p99", "runs")
    print_table("stages, in turns", header, rows)
    print(summary(result))


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    extra, found = entry["extra_info"], entry["stats"]
    return (
        entry["name"],
        f"{extra['pairs']:,}",
        f"{extra['pairs_per_s']:,.0f}",
        f"{extra['us_per_pair']:,.3f}",
        f"{found['min'] * 1e3:,.3f}",
        *(f"{extra[f'p{q}_ms']:,.3f}" for q in (50, 90, 99)),
        f"{found['rounds']:,}",
    )


def _rounds(stage: Stage, seconds: float) -> int:
    """Return how many runs fit into so many seconds, by what one takes now."""
    began = perf_counter()
    stage.run()
    once = perf_counter() - began
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, round(seconds / max(once, 1e-9))))
