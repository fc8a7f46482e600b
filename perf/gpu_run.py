"""`make gpu`: everything that needs an NVIDIA GPU, in one command of less than nine minutes.

    python -m edje.perf.gpu_run [--skip STEP]... [--only STEP]... [--list]

What is here; `pytest -m gpu`; the GPU's own ceilings; then the engines on the full-size
scorer with random weights and tokens. Every step runs in a process of its own with a time limit,
so a failing engine is a line of the table. Engines take turns with the pipeline over them, not
with each other: between engines compare minima, and look at the clocks beside each step.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from ..bundle import ModelSizes
from ..errors import EdjeError
from ..kernels.device.facts import current_gpu, gpu_fault
from . import bench_precisions
from .gpu_ceilings import PRECISIONS, roofs
from .gpu_contest import STAGES
from .gpu_steps import OK, SKIPPED, Report, StepResult, run_step
from .gpu_work import STEPS, Step
from .harness import RESULTS, conditions, write_result
from .random_model import DESCRIPTION, full_size
from .report import Measured, benchmark_json, folded

Row = Mapping[str, Any]

BUDGET_S = 500.0  # the whole run; the limits of the steps add up to more
MARGIN_S = 15.0  # a step starts nothing new so long before its end
LEAST_S = 20.0
LINES_SHOWN = 30  # of a failed step's output; the JSON keeps more
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"
HEAD = ("engine", "tokens", "words", "batch", "pairs/s", "of bare", "of roof", "stages, ms a batch",
        "max diff", "tau")  # fmt: skip


def run_steps(steps: Sequence[Step], scratch: Path, budget_s: float) -> list[StepResult]:
    """Run the steps one after the other; the last ones are skipped where time runs out."""
    end = monotonic() + budget_s
    results = []
    for step in steps:
        left_s = end - monotonic()
        if left_s < LEAST_S:
            results.append(StepResult(step.name, SKIPPED, 0.0, "the time was up"))
            continue
        print(f"... {step.name} ({step.help})", flush=True)
        limit_s = min(step.limit_s, left_s)
        report = scratch / f"{step.name}.json"
        command = [sys.executable, "-m", f"{__package__}.gpu_run", "--step", step.name]
        command += ["--report", str(report), "--seconds", str(limit_s - MARGIN_S)]
        before = clocks()
        result = run_step(step.name, command, report, limit_s, env={"EDJE_REQUIRE_GPU": "1"})
        values = {**result.values, "clocks": {"before": before, "after": clocks()}}
        results.append(replace(result, values=values))
        print(f"    {result.status}, {result.seconds:.0f} s {result.reason or ''}", flush=True)
        for line in result.output.splitlines()[-LINES_SHOWN:]:
            print(f"    | {line}", flush=True)
    return results


def clocks() -> str | None:
    """Return the GPU's clocks, temperature, power and load as nvidia-smi says them."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def result_of(steps: Sequence[StepResult], sizes: ModelSizes, gpu: str) -> dict[str, Any]:
    """Return everything that is written, as plain JSON values."""
    ceilings = [row for step in steps for row in step.values.get("ceilings", [])]
    rows = [row for step in steps for row in step.values.get("rows", [])]
    return {
        "conditions": conditions(
            gpu=gpu,
            model=DESCRIPTION,
            data="seeded random ids and standard normal tokens",
            timing="minimum of the rounds; bare and pipeline take turns, engines do not",
        ),
        "ceilings": ceilings,
        "ladder": with_roofs(rows, ceilings_of(ceilings), sizes),
        "steps": [
            {
                **asdict(step),
                "values": {k: v for k, v in step.values.items() if k not in ("ceilings", "rows")},
            }
            for step in steps
        ],
    }


def one_form(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result in the form of all: the ladder's runs are its benchmarks, the rest `result`.

    What a failed row has not measured stands in `result` only.
    """
    measured = [
        Measured(
            f"{row['engine']}: {row['via']}",
            "gpu",
            [one / 1e3 for one in row["wall_ms"]],
            pairs=row["pairs"],
            params={"wordpieces": row["wordpieces"], "batch": row["batch"]},
            cpu_seconds=[one / 1e3 for one in row["cpu_ms"]],
            share_of_roof=row["share_of_roof"],
        )
        for row in result["ladder"]
        if row.get("wall_ms")
    ]
    name, where = result["conditions"]["gpu"], result["conditions"]
    kept = {key: where[key] for key in ("gpu", "model", "data", "timing")}
    whole = benchmark_json(measured, conditions=kept, faults=faults_of(result))
    return {**whole, "result": folded(name, result)["result"]}


def ceilings_of(rows: Iterable[Row]) -> dict[str, float]:
    """Return the ceilings that others are shares of, by key; those that were measured."""
    return {row["key"]: row["per_s"] for row in rows if row["key"] and row["per_s"]}


def with_roofs(rows: Sequence[Row], ceilings: Mapping[str, float], sizes: ModelSizes) -> list[Any]:
    """Return the rows, each with `roofs` (pairs/s by ceiling) and `share_of_roof`.

    The share is of the large matrix product in the row's own precision; None where either was
    not measured, and for fp32, which has no such ceiling here.
    """
    made = []
    for row in rows:
        found = roofs(row["slots"], sizes, ceilings)
        kept = {name: limit for name, limit in found.items() if name not in PRECISIONS}
        roof, speed = found.get(row.get("precision", "")), row["pairs_per_s"]
        if roof:
            kept["product"] = roof
        share = speed / roof if speed and roof else None
        made.append({**row, "roofs": kept, "share_of_roof": share})
    return made


def faults_of(result: Mapping[str, Any]) -> list[str]:
    """Return what makes the run a failed one: GPU tests, wrong scores, or copies that block."""
    tests = [step["values"].get("failures", []) for step in result["steps"]]
    wrong = [
        f"{row['engine']} {row['via']}, batch {row['batch']}: {row['fault']}"
        for row in result["ladder"]
        if row["fault"] and "agreement" in row
    ]
    broken = [
        f"{step['name']}: {step['reason']}"
        for step in result["steps"]
        if step["name"] in ("found", "tests", "prepare") and step["status"] not in (OK, SKIPPED)
    ]
    slow = [
        f"{name}: {copies['text']}"
        for step in result["steps"]
        for name, copies in step["values"].get("copies", {}).items()
        if copies.get("blocks")
    ]
    return [*broken, *slow, *(name for names in tests for name in names), *wrong]


def summary(result: dict[str, Any]) -> str:
    """Return what the terminal gets."""
    values = [step["values"] for step in result["steps"]]
    return "\n".join(
        [
            *(found_text(found) for found in values if "gpu" in found),
            "ceilings:",
            *(f"  {row['name']:34} {_rate(row)}" for row in result["ceilings"]),
            "",
            engines_table(result["ladder"]),
            *(
                f"{step['name']}: {step['status']} after {step['seconds']:.0f} s: {step['reason']}"
                for step in result["steps"]
                if step["status"] != OK
            ),
            *(text for found in values for text in step_texts(found)),
            *(f"FAILED: {fault}" for fault in faults_of(result)),
        ]
    )


def found_text(values: Mapping[str, Any]) -> str:
    """Return what the first step found: GPU, versions, and what each backend runs or why not."""
    gpu, versions = values["gpu"], values["versions"]
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = ", ".join(name for name, version in versions.items() if not version)
    lines = [
        f"{gpu['name']}, compute capability {gpu['capability']}, "
        f"driver for CUDA {gpu['cuda_version']}, Python {values['python']}",
        f"  here: {there}",
        f"  not here: {absent or 'nothing that is used'}",
        f"  onnxruntime providers: {', '.join(values['onnxruntime_providers'])}",
    ]
    for name, backend in values["backends"].items():
        reasons = backend["precisions"]
        runs = ", ".join(precision for precision, reason in reasons.items() if reason is None)
        why_not = next((reason for reason in reasons.values() if reason), "")
        lines.append(f"  {name}: {runs or f'nothing: {why_not}'}")
    return "\n".join(lines)


def step_texts(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a step found beside its rows: tests, copies, latencies, the CPU's engines."""
    if "passed" in values:
        counts = ", ".join(f"{values[name]} {name}" for name in ("passed", "failed", "skipped"))
        yield f"tests: {counts}"
        yield from (f"  skipped: {reason}" for reason in values["skip_reasons"])
        yield from (f"{name}\n{text}" for name, text in values["failure_texts"].items())
    for name, copies in values.get("copies", {}).items():
        yield f"copies by {name}: {copies['fault'] or copies['text']}"
    for row in values.get("latencies", []):
        yield (
            f"{row['engine']}, {row['via']}: {row['candidates']} candidates, one caller, "
            f"p50 {row['p50_ms']:.2f} ms, least {row['min_ms']:.2f} ms"
        )
    if "cpu" in values:
        yield bench_precisions.summary(values["cpu"])


def engines_table(rows: Iterable[Row]) -> str:
    """Return the table: a line for every best row, then one for every fault."""
    best = best_rows(rows)
    lines = [HEAD, *(_cells(row) for row in best if row["pairs_per_s"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = [
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text += [
        f"{row['engine']}, {row['wordpieces']} words, batch {row['batch']}: {row['fault']}"
        for row in best
        if not row["pairs_per_s"]
    ]
    return "\n".join(text)


def best_rows(rows: Iterable[Row]) -> list[Row]:
    """Return the fastest batch of every engine, way and length, in the order of the rows.

    Where no batch worked, the first one that failed.
    """
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = row["engine"], row["via"], row["wordpieces"]
        if key not in best or (row["pairs_per_s"] or 0) > (best[key]["pairs_per_s"] or 0):
            best[key] = row
    return list(best.values())


def _cells(row: Row) -> tuple[str, ...]:
    stages, compared = row.get("stages_ms"), row["agreement"]
    return (
        row["engine"],
        row["via"],
        str(row["wordpieces"]),
        str(row["batch"]),
        f"{row['pairs_per_s']:,.0f}",
        _share(row.get("share_of_bare")),
        _share(row["share_of_roof"]),
        " + ".join(f"{stages[name]:.2f}" for name in STAGES) if stages else "-",
        f"{compared['max_abs_diff']:.1e}",
        f"{compared['kendall_tau']:.4f}",
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _rate(row: Row) -> str:
    if not row["per_s"]:
        return f"not measured: {row['fault']}"
    if row["unit"] == "byte/s":
        return f"{row['per_s'] / 1e9:8.1f} GB/s"
    return f"{row['per_s'] / 1e12:8.1f} TFLOP/s"


def safe_name(gpu: str) -> str:
    """Return a GPU's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def chosen_steps(only: Sequence[str], skip: Sequence[str]) -> list[Step]:
    """Return the steps to run, in their order.

    Raises:
        EdjeError: names of no step (all named).
    """
    names = [step.name for step in STEPS]
    unknown = sorted({*only, *skip} - set(names))
    if unknown:
        raise EdjeError(
            f"no such step: {', '.join(unknown)}", hint=f"the steps are {', '.join(names)}"
        )
    return [s for s in STEPS if s.name not in skip and (not only or s.name in only)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write the JSON; 1 where GPU tests fail or scores are wrong, 2 without a GPU."""
    options = _options(arguments)
    if options.list:
        print("\n".join(f"{step.name:18} {step.help}" for step in STEPS))
        return 0
    if options.step is not None:
        return _run_one(options)
    fault = gpu_fault()
    if fault is not None:
        print(f"make gpu needs an NVIDIA GPU: {fault}", file=sys.stderr)
        return 2
    try:
        steps = chosen_steps(options.only, options.skip)
    except EdjeError as error:
        print(error, file=sys.stderr)
        return 2
    gpu = current_gpu().name
    with TemporaryDirectory() as scratch:
        results = run_steps(steps, Path(scratch), options.seconds)
    result = result_of(results, full_size(), gpu)
    print(summary(result))
    name = f"{safe_name(gpu)}-{date.today().isoformat()}"
    path = write_result(name, one_form(result), options.out)
    print(f"written to {path}")
    return 1 if faults_of(result) else 0


def _run_one(options: argparse.Namespace) -> int:
    """Do one step here; what it lacks is said in one sentence."""
    try:
        [step] = chosen_steps([options.step], [])
        step.run(Report(options.report, options.seconds))
    except EdjeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m edje.perf.gpu_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", default=[], metavar="STEP")
    parser.add_argument("--skip", action="append", default=[], metavar="STEP")
    parser.add_argument("--list", action="store_true", help="list the steps and end")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="for the whole run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
