"""The committed figures that the capacity model reads: stage costs, and points to be predicted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from .harness import RESULTS

H200, STORE, PIPELINE = "nvidia-h200-2026-11-27", "store", "pipeline"
SERVE, END_TO_END = "serve", "end_to_end"
COMPILED, ONNXRUNTIME = "torch.compile, CUDA graphs", "ONNX Runtime CUDA fp16"
EAGER = "PyTorch eager, official"
RANKED, NO_ENGINE = f"{COMPILED}: rank", "no engine: what can be fed: rank"
BARE, PIPELINED, RESIDENT = "bare", "pipeline", "resident"
PLACES = ("disk", "host", "device")
RANKED_PAIRS, RANKED_BATCH, FEW = 25_000, 1000, 100


@dataclass(frozen=True, slots=True)
class Row:
    """One engine at one batch size, as `make gpu` measured it.

    Attributes:
        engine, via: what ran, and how its tokens came: bare, pipeline, resident, or a place.
        slots: token slots a pair.
        batch, pairs: pairs a batch, pairs a run.
        seconds, cpu_seconds: least time of a run.
        stages_ms: of a batch, by the runtime's own timers; empty where there are none.
    """

    engine: str
    via: str
    slots: int
    batch: int
    pairs: int
    seconds: float
    cpu_seconds: float
    stages_ms: Mapping[str, float]

    @property
    def num_batches(self) -> int:
        """Batches a run."""
        return -(-self.pairs // self.batch)

    @property
    def pairs_per_s(self) -> float:
        """Speed of the least time."""
        return self.pairs / self.seconds


@cache
def result(name: str) -> dict[str, Any]:
    """Return a committed result by its file's name."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    inner: dict[str, Any] = found.get("result", found)  # `report.folded` puts it there
    return inner


def rows(engine: str, via: str | None = None, name: str = H200) -> list[Row]:
    """Return the right-scoring rows of an engine, all ways or one."""
    return [
        Row(
            engine=row["engine"],
            via=row["via"],
            slots=row["slots"],
            batch=row["batch"],
            pairs=row["pairs"],
            seconds=row["min_ms"] / 1e3,
            cpu_seconds=row["min_cpu_ms"] / 1e3,
            stages_ms=row.get("stages_ms") or {},
        )
        for row in result(name)["ladder"]
        if row["engine"] == engine and via in (None, row["via"]) and not row["fault"]
    ]


def row(engine: str, via: str, name: str = H200) -> Row:
    """Return the one row of an engine and a way."""
    [found] = rows(engine, via, name)
    return found


def ceiling(key: str, name: str = H200) -> float:
    """Return a measured ceiling of the GPU: byte/s or FLOP/s."""
    return next(float(each["per_s"]) for each in result(name)["ceilings"] if each["key"] == key)


def latency_s(engine: str, place: str, name: str = H200) -> float:
    """Return the median time of `FEW` candidates for one caller."""
    steps = {step["name"]: step for step in result(name)["steps"]}
    for each in steps["rank"]["values"]["latencies"]:
        if (each["engine"], each["via"]) == (engine.removesuffix(": rank"), place):
            return float(each["p50_ms"]) / 1e3
    raise LookupError(f"{engine}, {place}: not in {name}")


def stage_files() -> list[str]:
    """Return the committed results of `edje bench run`, by name."""
    names = sorted(path.stem for path in RESULTS.glob("*.json"))
    return [name for name in names if {"read", "forward", "rank"} <= set(stages_of(result(name)))]


def stages_of(found: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """Return (pairs, least seconds) of every stage that `edje bench run` has measured."""
    return {
        each["name"]: (each["extra_info"]["pairs"], each["stats"]["min"])
        for each in found.get("benchmarks", [])
        if each["group"] == "stages" and not each["params"]
    }


def timing_ms(name: str, *keys: str, timing: str) -> float:
    """Return the least milliseconds of one contestant below `keys` of a result."""
    found: Any = result(name)
    for key in keys:
        found = found[key]
    return next(float(each["min_ms"]) for each in found if each["name"] == timing)
