"""The README's first chart: what bars it has, from which results, under which conditions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .charts import KINDS, Bar, Panel
from .report import Result, entries, summary

H200 = "nvidia-h200-2026-11-27"
SHORT, LONG = 13, 61  # wordpieces
OFFICIAL = "Hugging Face PyTorch float32, as evaluated"
OFFICIAL_GPU = "Hugging Face PyTorch fp16, as evaluated, tokens on the GPU"
AUTO, OFFICIAL_PEER = "auto", "hf-official-fp32"  # their names among the peers
# Engine of the ladder, way of its tokens, label, kind.
LADDER = (
    ("torch.compile, CUDA graphs", "resident", "edje, fp16, tokens on the GPU", "ours"),
    ("torch.compile, CUDA graphs", "pipeline", "edje, fp16, tokens from host memory", "ours"),
    ("ONNX Runtime CUDA fp16", "bare", "ONNX Runtime CUDA fp16, tokens on the GPU", "library"),
    (
        "PyTorch eager, official",
        "bare",
        OFFICIAL_GPU,
        "peer",
    ),
    ("PyTorch eager, official", "from host", "the same, tokens from host memory", "peer"),
)


def panels(results: Mapping[str, Result]) -> list[Panel]:
    """Return what the chart shows: this repository's CPU machine, and the H200 with its host."""
    found = []
    if "peers" in results:
        found.append(_peers_panel(results["peers"]))
    if H200 in results:
        [cpu] = [one["values"]["cpu"] for one in results[H200]["steps"] if one["name"] == "cpu"]
        where = cpu["conditions"]
        features = " with AMX" if "amx_int8" in where["cpu_features"] else ""
        title = f"{where['cores']} cores of an Intel Xeon{features}"
        found.append(Panel(title, _precision_bars(cpu), OFFICIAL))
        found.append(_h200_panel(results[H200]))
    return found


def _peers_panel(peers: Result) -> Panel:
    """Return who computes our function: us by `auto`, the fastest library, every peer."""
    bars: dict[str, list[Bar]] = {kind: [] for kind in KINDS}
    base = ""
    for one in entries(peers, "peers", wordpieces=SHORT):
        where = one["extra_info"]["conditions"]
        if where["function"] == "other" or (where["kind"] == "ours" and one["name"] != AUTO):
            continue
        bars[where["kind"]].append(Bar(where["what"], _speed(one), where["kind"]))
        if one["name"] == OFFICIAL_PEER:
            base = where["what"]
    fastest = sorted(bars["library"], key=lambda bar: bar.value)[-1:]
    cpu = peers["machine_info"]["cpu"]
    title = f"{cpu['count']} cores of an {cpu['brand_raw']}"
    return Panel(title, [*bars["ours"], *fastest, *bars["peer"]], base)


def _speed(entry: Mapping[str, Any]) -> float:
    speed: float = entry["extra_info"]["pairs_per_s"]
    return speed


def _precision_bars(result: Result) -> list[Bar]:
    named = {
        "openvino int8": ("edje, OpenVINO int8", "ours"),
        "openvino bf16": ("edje, OpenVINO bf16", "ours"),
        "openvino fp32": ("edje, OpenVINO float32", "ours"),
        "onnxruntime fp32": ("ONNX Runtime float32", "library"),
        "Hugging Face fp32": (OFFICIAL, "peer"),
    }
    rows = result["batch_256"]["timings"]
    return [
        Bar(named[row["name"]][0], row["pairs_per_s"], named[row["name"]][1])
        for row in rows
        if row["name"] in named
    ]


def _h200_panel(h200: Result) -> Panel:
    bars, roof = [], None
    for engine, via, label, kind in LADDER:
        best = best_of_ladder(h200, engine, via, SHORT)
        bars.append(Bar(label, best["pairs_per_s"], kind))
        roof = best["pairs_per_s"] / best["share_of_roof"]
    return Panel(
        f"one {h200['conditions']['gpu']}", bars, OFFICIAL_GPU, roof, "fp16 products alone:"
    )


def best_of_ladder(h200: Result, engine: str, via: str, wordpieces: int) -> Mapping[str, Any]:
    rows: list[Mapping[str, Any]] = [
        row
        for row in h200["ladder"]
        if (row["engine"], row.get("via"), row.get("wordpieces")) == (engine, via, wordpieces)
        and row.get("pairs_per_s")
    ]
    return max(rows, key=lambda row: row["pairs_per_s"])


def chart_conditions(results: Mapping[str, Result]) -> str:
    """Return what stands below the chart."""
    said = [
        "Full-size scorer (12 layers, hidden 384, 64 visual tokens an image), random weights, one "
        f"query of {SHORT} wordpieces and its candidates; minima of interleaved runs, scores "
        "checked in the run.",
    ]
    if "peers" in results:
        said.append(f"First machine: {summary(results['peers'])}.")
    if H200 in results:
        where = results[H200]["conditions"]
        said.append(
            f"Second and third: batches of 256; the best batch on the GPU, edje through "
            f"torch.compile and CUDA graphs; {where['time'][:10]}."
        )
    return " ".join(said)


def chart_digest(results: Mapping[str, Result]) -> str:
    """Return a hash of all that the chart shows; it stands in the SVG."""
    shown = [asdict(panel) for panel in panels(results)], chart_conditions(results)
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()
