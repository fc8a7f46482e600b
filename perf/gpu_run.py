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
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from ..bundle import ModelSizes
from ..errors import EdjeError
from ..kernels.device.facts import current_gpu, gpu_fault
from . import random_model
from .gpu_steps import OK, SKIPPED, Report, StepResult, run_step
from .gpu_table import ceilings_of, ceilings_text, engines_table, found_text, step_texts, with_roofs
from .gpu_work import STEPS, Step, find_step
from .harness import RESULTS, conditions, write_result

BUDGET_S = 500.0  # the whole run; the limits of the steps add up to more
MARGIN_S = 15.0  # a step starts nothing new so long before its end
LEAST_S = 20.0
LINES_SHOWN = 30  # of a failed step's output; the JSON keeps more
_CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu"


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
    command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader"]
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
            model="12 layers, hidden 384, FFN 1536, 64 tokens, random weights",
            data="seeded random ids and standard normal tokens",
            timing="minimum of the rounds; bare and pipeline take turns, engines do not",
        ),
        "ceilings": ceilings,
        "ladder": with_roofs(rows, ceilings_of(ceilings), sizes),
        "steps": [
            {**step.to_json(), "values": _without(step.values, ("ceilings", "rows"))}
            for step in steps
        ],
    }


def _without(values: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def faults_of(result: dict[str, Any]) -> list[str]:
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


def summary(result: dict[str, Any], steps: Sequence[StepResult]) -> str:
    """Return what the terminal gets."""
    found = [found_text(step.values) for step in steps if "gpu" in step.values]
    parts = [*found, ceilings_text(result["ceilings"])]
    return "\n".join(
        [
            *parts,
            "",
            engines_table(result["ladder"], steps),
            *(text for step in steps for text in step_texts(step.values)),
            *(f"FAILED: {fault}" for fault in faults_of(result)),
        ]
    )


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
    result = result_of(results, random_sizes(), gpu)
    print(summary(result, results))
    path = write_result(f"{safe_name(gpu)}-{date.today().isoformat()}", result, options.out)
    print(f"written to {path}")
    return 1 if faults_of(result) else 0


def _run_one(options: argparse.Namespace) -> int:
    """Do one step here; what it lacks is said in one sentence."""
    try:
        find_step(options.step).run(Report(options.report, options.seconds))
    except EdjeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def random_sizes() -> ModelSizes:
    """Return the sizes of the full-size random model, without exporting it."""
    return ModelSizes(
        num_tokens=random_model.NUM_TOKENS,
        hidden=random_model.HIDDEN,
        num_layers=random_model.NUM_LAYERS,
        num_heads=random_model.NUM_HEADS,
        intermediate=random_model.INTERMEDIATE,
        vocab_size=random_model.NUM_WORDS + 1,
        feature_dim=random_model.FEATURE_DIM,
        num_features=None,
    )


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
