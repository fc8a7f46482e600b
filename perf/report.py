"""One form for all results: pytest-benchmark's JSON, with our machine and conditions in it."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from statistics import mean, stdev
from typing import Any

import numpy as np

from .. import __version__
from ..machine import available_memory_bytes, cpu_features, cpu_model, usable_cores
from .harness import LIBRARIES, commit_facts, versions, write_result

__all__ = [
    "Measured",
    "Result",
    "benchmark_json",
    "entries",
    "fingerprint",
    "folded",
    "machine_info",
    "summary",
    "write_result",
]

GPU_LIBRARIES = ("cuda-core", "onnxruntime-gpu", "tensorrt", "triton")
# Conditions that `machine_info` and `commit_info` tell.
_OF_THE_MACHINE = ("cpu", "cpu_features", "cores", "python", "versions", "commit", "time")
FORMAT = "edje-bench 1"  # of `extra_info`; the rest is pytest-benchmark's


Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """Runs of one contestant under one set of conditions.

    Attributes:
        name: of the contestant or stage; `fullname` in the JSON adds group and parameters.
        group: what is compared with each other.
        seconds: wall time of every run, in their order.
        pairs: that one run handles; 0 where it handles none.
        params: what a sweep varied, by name.
        cpu_seconds: CPU time of all threads, every run; empty: not measured.
        share_of_roof: of the roof measured in the same run; None: no roof is known.
        counters: exact numbers, by name: the same in every run, more is worse.
        rates: what else a second of the least time holds, by name: FLOPs, bytes.
        conditions: what else the figure depends on.
        elapsed_s: of all runs together, where several go on at once: then speed is all their pairs
            over it; None: they came one by one, and speed is of the least time.
    """

    name: str
    group: str
    seconds: Sequence[float]
    pairs: int = 0
    params: Mapping[str, Any] = field(default_factory=dict)
    cpu_seconds: Sequence[float] = ()
    share_of_roof: float | None = None
    counters: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    elapsed_s: float | None = None

    @property
    def fullname(self) -> str:
        """Group, name and parameters: `stages::rank[candidates=1000]`, one of its kind a file."""
        some = ",".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.group}::{self.name}[{some}]" if some else f"{self.group}::{self.name}"

    @property
    def pairs_per_s(self) -> float | None:
        """Pairs/s; None where a run handles none."""
        if not self.pairs:
            return None
        if self.elapsed_s is not None:
            return self.pairs * len(self.seconds) / self.elapsed_s
        return self.pairs / min(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Return one entry of `benchmarks`: speed from the minimum, percentiles of all runs."""
        p50, p90, p99 = (float(np.percentile(self.seconds, q)) * 1e3 for q in (50, 90, 99))
        speed = self.pairs_per_s
        extra: dict[str, Any] = {
            "format": FORMAT,
            "pairs": self.pairs,
            "pairs_per_s": None if speed is None else round(speed, 3),
            "us_per_pair": None if speed is None else round(1e6 / speed, 4),
            "p50_ms": round(p50, 6),
            "p90_ms": round(p90, 6),
            "p99_ms": round(p99, 6),
            "min_cpu_ms": round(min(self.cpu_seconds) * 1e3, 6) if self.cpu_seconds else None,
            "share_of_roof": None if self.share_of_roof is None else round(self.share_of_roof, 6),
            "counters": dict(self.counters),
            "rates": dict(self.rates),
            "conditions": dict(self.conditions),
        }
        return {
            "group": self.group,
            "name": self.name,
            "fullname": self.fullname,
            "params": dict(self.params),
            "param": ",".join(map(str, self.params.values())) or None,
            "extra_info": extra,
            "options": {"timer": "perf_counter", "warmup": True, "disable_gc": False},
            "stats": stats(self.seconds),
        }


def folded(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of an older benchmark in the one form of all.

    Whatever its timings are (`harness.timings_json`), they become entries of `benchmarks`, grouped
    by where they stood; the rest is kept as `result`.
    """
    rest, measured = _without_runs(dict(result), name)
    conditions = result.get("conditions", {})
    where = {key: value for key, value in conditions.items() if key not in _OF_THE_MACHINE}
    whole = benchmark_json(measured, conditions=where)
    return {**whole, "faults": list(result.get("faults", ())), "result": rest}


def _without_runs(value: Any, group: str) -> tuple[Any, list[Measured]]:
    """Take the runs out of all timings below `value`; return the rest, and what they measured."""
    measured: list[Measured] = []
    if isinstance(value, Mapping):
        kept = {}
        for key, below in value.items():
            if key in ("wall_ms", "cpu_ms"):
                continue
            inner = group if key == "timings" else f"{group}/{key}"
            kept[key], found = _without_runs(below, inner)
            measured += found
        if value.get("wall_ms"):
            wall, cpu = ([one / 1e3 for one in value[key]] for key in ("wall_ms", "cpu_ms"))
            measured.append(Measured(value["name"], group, wall, value["pairs"], cpu_seconds=cpu))
        return kept, measured
    if isinstance(value, list | tuple):
        parts = [_without_runs(one, group) for one in value]
        return [rest for rest, _ in parts], [one for _, found in parts for one in found]
    return value, measured


def stats(seconds: Sequence[float]) -> dict[str, Any]:
    """Return pytest-benchmark's `stats` of runs of one iteration each, in seconds."""
    q1, middle, q3 = (float(np.percentile(seconds, q)) for q in (25, 50, 75))
    average, spread = mean(seconds), stdev(seconds) if len(seconds) > 1 else 0.0
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    far = sum(abs(one - average) > spread for one in seconds)
    out = sum(not low <= one <= high for one in seconds)
    return {
        "min": min(seconds),
        "max": max(seconds),
        "mean": average,
        "stddev": spread,
        "rounds": len(seconds),
        "median": middle,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": out,
        "stddev_outliers": far,
        "outliers": f"{far};{out}",
        "ld15iqr": min(one for one in seconds if one >= low),
        "hd15iqr": max(one for one in seconds if one <= high),
        "ops": 1 / average,
        "total": sum(seconds),
        "iterations": 1,
    }


def benchmark_json(
    measured: Sequence[Measured], *, conditions: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """Return a whole result, ready for `write_result`.

    Args:
        conditions: of every entry, beside its own.
        more: further top-level keys; `faults` makes the command fail.
    """
    shared = dict(conditions or {})
    entries = [one.to_json() for one in measured]
    for entry in entries:
        own = entry["extra_info"]["conditions"]
        entry["extra_info"]["conditions"] = {**shared, **own}
    return {
        "machine_info": machine_info(),
        "commit_info": commit_facts(),
        "benchmarks": entries,
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        **more,
    }


def machine_info() -> dict[str, Any]:
    """Return this machine as pytest-benchmark keeps one, with what our figures depend on."""
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "release": platform.release(),
        "python_implementation": platform.python_implementation(),
        "python_version": platform.python_version(),
        "cpu": {
            "brand_raw": cpu_model(),
            "count": usable_cores(),
            "features": list(cpu_features()),
        },
        "memory_bytes": available_memory_bytes(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "gpu": gpu_facts(),
        "libraries": {"edje-runtime": __version__, **versions([*LIBRARIES, *GPU_LIBRARIES])},
    }


def gpu_facts() -> dict[str, Any] | None:
    """Return name, driver and memory of the first NVIDIA GPU; None where there is none."""
    command = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    name, driver, memory = (word.strip() for word in done.stdout.splitlines()[0].split(","))
    return {"name": name, "driver": driver, "memory": memory}


def fingerprint(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be equal of two `machine_info` for their figures to be compared."""
    gpu = info.get("gpu")
    return {
        "cpu": info["cpu"]["brand_raw"],
        "cores": info["cpu"]["count"],
        "features": tuple(info["cpu"]["features"]),
        "gpu": None if gpu is None else (gpu["name"], gpu["driver"]),
    }


def entries(result: Result, group: str, **params: Any) -> list[Mapping[str, Any]]:
    """Return the benchmarks of a group with these parameters."""
    return [
        one
        for one in result["benchmarks"]
        if one["group"] == group and params.items() <= one["params"].items()
    ]


def summary(result: Result) -> str:
    """Return the line of conditions that stands below every table."""
    info, commit = result["machine_info"], result["commit_info"]["id"]
    gpu = "" if info["gpu"] is None else f", {info['gpu']['name']}"
    load = info["load_average"][0]
    return (
        f"({info['cpu']['brand_raw']}, {info['cpu']['count']} cores{gpu}, "
        f"load {load}, commit {commit}, {result['datetime'][:10]})"
    )
