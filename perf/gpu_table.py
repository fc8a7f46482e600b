"""The figures of a GPU run as text: what was found, the ceilings, and one table of its engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..bundle import ModelSizes
from . import bench_precisions
from .gpu_steps import OK, StepResult
from .roofline import roofs

Row = Mapping[str, Any]
HEAD = ("engine", "tokens", "words", "batch", "pairs/s", "of bare", "of roof", "stages, ms a batch",
        "max diff", "tau")  # fmt: skip
STAGES = ("gather_ms", "upload_ms", "compute_ms", "download_ms")
PRODUCTS = ("fp16", "int8", "fp8")


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
        kept = {name: v for name, v in found.items() if name not in PRODUCTS}
        roof = found.get(row.get("precision", ""))
        if roof:
            kept["product"] = roof
        speed = row["pairs_per_s"]
        share = speed / roof if speed and roof else None
        made.append({**row, "roofs": kept, "share_of_roof": share})
    return made


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


def engines_table(rows: Iterable[Row], steps: Iterable[StepResult]) -> str:
    """Return the table: a line for every best row, then one for every fault or failed step."""
    best = best_rows(rows)
    lines = [HEAD, *(_cells(row) for row in best if row["pairs_per_s"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = ["  ".join(_aligned(line, widths)).rstrip() for line in lines]
    return "\n".join([*text, *_faults(rows_without_speed(best)), *_failed(steps)])


def rows_without_speed(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that measured nothing."""
    return [row for row in rows if not row["pairs_per_s"]]


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


def ceilings_text(rows: Iterable[Row]) -> str:
    """Return a heading and a line for every ceiling."""
    return "\n".join(["ceilings:", *(f"  {row['name']:34} {_rate(row)}" for row in rows)])


def _rate(row: Row) -> str:
    if not row["per_s"]:
        return f"not measured: {row['fault']}"
    if row["unit"] == "byte/s":
        return f"{row['per_s'] / 1e9:8.1f} GB/s"
    return f"{row['per_s'] / 1e12:8.1f} TFLOP/s"


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


def _aligned(line: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for index, (cell, width) in enumerate(zip(line, widths, strict=True)):
        yield cell.ljust(width) if index < 2 else cell.rjust(width)


def _faults(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        yield f"{row['engine']}, {row['wordpieces']} words, batch {row['batch']}: {row['fault']}"


def _failed(steps: Iterable[StepResult]) -> Iterator[str]:
    for step in steps:
        if step.status != OK:
            yield f"{step.name}: {step.status} after {step.seconds:.0f} s: {step.reason}"
