"""What every precision does to the demo's ranking: `python -m edje.perf.bench_fidelity DEMO_OUT`.

All test queries over their first-stage candidates, each precision as its graph on the CPU: int8
and fp8 by their Q/DQ graphs, fp16, bf16 and fp8 emulated (rounded where the graph rounds). int8
and bf16 also run for real, on every CPU backend that can. Scales come from the demo's calibration
drawings. Expected: R@1 within 0.3 points of float32 and Kendall tau of at least 0.97.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..arrays import Float32
from ..bundle import JOINT_ENCODER, BundleManifest
from ..engines.agreement import rank_agreement, recall
from ..engines.builder.build import build_engine
from ..engines.builder.options import EngineOptions
from ..engines.fidelity import Scorer, engine_scorer, reference_scorer
from ..engines.precision.emulate import scorer
from ..engines.precision.graph import Graph
from ..engines.precision.prepare import Recipe, prepare_graph
from ..engines.registry import open_engine, probe_backends
from ..engines.samples import Samples, sample_batches
from ..errors import EdjeError
from ..runtime.queries import StoreSamples
from ..show import progress_bar, progress_steps
from .harness import add_out_option, conditions, write_result

MAX_LOSS, MIN_TAU = 0.3, 0.97
REFERENCE = "float32"
# Name of the row, precision, and the type of what is not quantised.
EMULATED = (
    ("bf16", "bf16", "bfloat16"),
    ("fp16", "fp16", "float16"),
    ("int8, rest fp16", "int8", "float16"),
    ("fp8, rest fp16", "fp8", "float16"),
)
FOR_REAL = ("bf16", "int8")  # on every CPU backend, where the CPU has the instructions


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write `fidelity.json`; 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder written by `edje demo`")
    parser.add_argument("--queries", type=int, help="use no more; default: all")
    add_out_option(parser)
    options = parser.parse_args(arguments)
    bundle, calibration = options.demo / "bundle", options.demo / "calibration"
    with (
        TemporaryDirectory() as scratch,
        ExitStack() as stack,
        StoreSamples.open(
            calibration / "scenes.store", bundle, calibration / "queries.jsonl"
        ) as pairs,
        StoreSamples.open(
            options.demo / "scenes.store",
            bundle,
            options.demo / "queries.jsonl",
            max_queries=options.queries,
        ) as samples,
    ):
        scorers, plans = open_scorers(bundle, pairs, Path(scratch), stack)
        rows = measure(scorers, samples, bundle)
        data = {"test": samples.data, "calibration": pairs.data}
    broken = [name for name, row in rows.items() if is_broken(row)]
    print(table(rows))
    result = {**conditions(**data), "rows": rows, "plans": plans, "broken": broken}
    print(f"written to {write_result('fidelity', result, options.out)}")
    return 1 if broken else 0


def open_scorers(
    bundle: Path, pairs: Samples, scratch: Path, stack: ExitStack
) -> tuple[dict[str, Scorer], dict[str, Any]]:
    """Open float32, every precision's graph, and int8 on the backends of this machine."""
    manifest = BundleManifest.read(bundle)
    profile = EngineOptions().profile(manifest.text.max_wordpieces)
    scorers: dict[str, Scorer] = {REFERENCE: reference_scorer(bundle)}
    plans: dict[str, Any] = {}
    with progress_steps("Building") as tell:
        for name, precision, compute_type in EMULATED:
            graph = scratch / "graph.onnx"
            recipe = Recipe(precision, compute_type, calibration=pairs)
            source = bundle / JOINT_ENCODER
            plans[name] = prepare_graph(source, graph, recipe, manifest, profile, tell)
            scorers[f"{name} (graph)"] = scorer(Graph.read(graph))
        for status in probe_backends(("openvino", "onnxruntime")):
            for precision in (each for each in FOR_REAL if each in status.usable):
                folder = scratch / f"{status.name}-{precision}"
                arguments: dict[str, Any] = {"calibration": pairs, "progress": tell}
                build_engine(bundle, folder, backend=status.name, precision=precision, **arguments)
                engine = stack.enter_context(closing(open_engine(folder)))
                scorers[f"{precision}, {status.name} {status.version}"] = engine_scorer(engine)
    return scorers, plans


def measure(
    scorers: Mapping[str, Scorer], samples: Samples, bundle: Path
) -> dict[str, dict[str, Any]]:
    """Score every sample with everybody; return each one's agreement with float32 and recall."""
    text = BundleManifest.read(bundle).text
    profile = EngineOptions().profile(text.max_wordpieces)
    found: dict[str, list[Float32]] = {name: [] for name in scorers}
    targets = []
    with progress_bar("Scoring") as advance:
        for number, sample in enumerate(samples):
            batches = list(sample_batches(sample, profile, pad_id=text.pad_id, sep_id=text.sep_id))
            for name, score in scorers.items():
                found[name].append(np.concatenate([score(batch) for batch in batches]))
            targets.append(sample.target)
            advance(number + 1, len(samples))
    exact = recall(found[REFERENCE], targets)
    if exact is None:
        raise EdjeError("no query of the demo knows its target")
    rows = {}
    for name, scores in found.items():
        shares = recall(scores, targets) or {}
        row = asdict(rank_agreement(found[REFERENCE], scores))
        loss = 100 * (exact["R@1"] - shares["R@1"])
        rows[name] = {**row, **shares, "loss_of_r1_points": loss}
    return rows


def is_broken(row: Mapping[str, Any]) -> bool:
    """Tell whether a row misses what is expected."""
    return bool(row["loss_of_r1_points"] > MAX_LOSS + 1e-9 or row["kendall_tau"] < MIN_TAU)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| | R@1 | R@5 | tau | top 1 | max difference | mean |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {100 * row['R@1']:.1f} % | {100 * row['R@5']:.1f} % "
            f"| {row['kendall_tau']:.4f} | {100 * row['top_1']:.1f} % "
            f"| {row['max_abs_diff']:.2g} | {row['mean_abs_diff']:.2g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
