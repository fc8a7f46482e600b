"""What every precision, and int8 tokens, do to the ranking of the demo, or of a folder like it.

    edje bench fidelity DEMO_OUT             writes fidelity.json
    edje bench fidelity DEMO_OUT --tokens    writes int8_tokens.json

Precisions: all test queries over their first-stage candidates, each precision as its graph on the
CPU: fp16, bf16, and int8 and fp8 with static scales and with scales found while running, emulated
(rounded where the graph rounds), once holding a build's limits and once with nothing kept in 16
bit. float32, bf16 and int8 also run for real, on every CPU backend that can, and are timed in turns
on one query's candidates. What is kept is printed below the table. Scales come from the demo's
calibration drawings. Expected, but where nothing is kept: R@1 within 0.3 points of float32 and
Kendall tau of at least 0.97.

Tokens: the same queries by the whole `Reranker.rank`, from the demo's float16 store and from an
int8 store of the same scenes. Expected: the float32 engine loses at most 0.2 points of R@1 to int8
tokens, however it reads them. Beside it, what reading them costs: random gathers of full-size
records (64 x 384), verified, in turns, page cache hot.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import read_text
from ..arrays import Array, Float32
from ..bundle import JOINT_ENCODER, BundleManifest
from ..engines.agreement import rank_agreement, recall
from ..engines.builder.build import build_engine
from ..engines.builder.options import EngineOptions
from ..engines.contract import Batch
from ..engines.fidelity import FidelityLimits, Scorer, engine_scorer, reference_scorer
from ..engines.native.backend import NEVER_QUANTIZED
from ..engines.precision.emulate import scorer
from ..engines.precision.graph import Graph
from ..engines.precision.prepare import Recipe, prepare_graph
from ..engines.registry import open_engine, probe_backends
from ..engines.samples import Samples, sample_batches
from ..engines.scales import DYNAMIC, Scales
from ..errors import EdjeError, EngineError
from ..runtime.queries import StoreSamples
from ..runtime.reranker import Reranker
from ..runtime.source import Float16Tokens
from ..runtime.store import TokenStore
from ..tokens import dequantize_tokens, quantize_tokens
from .harness import (
    Progress,
    command_line,
    conditions,
    interleave,
    run_benchmark,
    scores_in_order,
    timings_json,
    timings_table,
)
from .random_model import full_size, image_id, random_tokens, write_store

MAX_LOSS, MIN_TAU = 0.3, 0.97
REFERENCE, GRAPH = "float32", " (graph)"
TOKEN_SCALES = Scales(DYNAMIC, never=NEVER_QUANTIZED)  # those of the native backend
FINE_SCALES = Scales(DYNAMIC, block=32)
NO_LIMITS = FidelityLimits()
# What is judged, by row: graphs that hold the limits of a build.
EMULATED = {
    "bf16": Recipe("bf16", "bfloat16"),
    "fp16": Recipe("fp16", "float16"),
    "int8, rest fp16": Recipe("int8", "float16"),
    "fp8, rest fp16": Recipe("fp8", "float16"),
    "int8 token scales, rest fp16": Recipe("int8", "float16", scales=(TOKEN_SCALES,)),
    "fp8 token scales, rest fp16": Recipe("fp8", "float16", scales=(TOKEN_SCALES,)),
}
# What 8 bits do by themselves; nothing is judged.
UNBOUND = {
    "int8, nothing kept": Recipe("int8", "float32", limits=NO_LIMITS),
    "int8 token scales, nothing kept": Recipe(
        "int8", "float32", limits=NO_LIMITS, scales=(TOKEN_SCALES,)
    ),
    "int8 token scales of 32 columns, nothing kept": Recipe(
        "int8", "float32", limits=NO_LIMITS, scales=(FINE_SCALES,)
    ),
    "fp8, nothing kept": Recipe("fp8", "float32", limits=NO_LIMITS),
    "fp8 token scales, nothing kept": Recipe(
        "fp8", "float32", limits=NO_LIMITS, scales=(TOKEN_SCALES,)
    ),
}
# On every CPU backend, where the CPU has the instructions; timed in turns as well.
FOR_REAL = ("fp32", "bf16", "int8")
NUM_TURNS = 12

MAX_LOSS_TO_TOKENS = 0.2
FLOAT16_TOKENS = "fp32, float16 tokens"
# Name of the row -> precision, dtype of the stored tokens, dtype that the engine takes.
TOKENS = {
    FLOAT16_TOKENS: ("fp32", "float16", "float16"),
    "fp32, int8 tokens dequantised": ("fp32", "int8", "float16"),
    "fp32, int8 tokens": ("fp32", "int8", "int8"),
    "int8, float16 tokens": ("int8", "float16", "float16"),
    "int8, int8 tokens": ("int8", "int8", "int8"),
}
BACKEND = "openvino"
NUM_RECORDS, GATHERED, NUM_ROUNDS = 2048, 256, 30
AS_STORED, DEQUANTISED = "int8, as stored", "int8, dequantised"

Rows = dict[str, dict[str, Any]]


def measure_precisions(
    demo: Path, num_queries: int | None, scratch: Path, progress: Progress
) -> dict[str, Any]:
    """Score every query with everybody; return each one's agreement with float32 and recall."""
    bundle = demo / "bundle"
    text = BundleManifest.read(bundle).text
    profile = EngineOptions().profile(text.max_wordpieces)
    with ExitStack() as stack:
        calibration = stack.enter_context(demo_samples(demo / "calibration", bundle))
        samples = stack.enter_context(demo_samples(demo, bundle, num_queries))
        scorers, plans = open_scorers(bundle, calibration, scratch, stack, progress)
        scores: dict[str, list[Float32]] = {name: [] for name in scorers}
        targets = []
        progress(f"scoring {len(samples)} queries")
        for sample in samples:
            batches = list(sample_batches(sample, profile, pad_id=text.pad_id, sep_id=text.sep_id))
            for name, score in scorers.items():
                scores[name].append(score_all(score, batches))
            targets.append(sample.target)
        speed = measure_speed(scorers, batches)
        where = conditions(test=samples.data, calibration=calibration.data)
    rows = compare(scores, targets, REFERENCE)
    broken = [
        name
        for name, row in rows.items()
        if name.removesuffix(GRAPH) not in UNBOUND
        and (row["loss_of_r1_points"] > MAX_LOSS + 1e-9 or row["kendall_tau"] < MIN_TAU)
    ]
    return {**where, "rows": rows, "plans": plans, "speed": speed, "broken": broken}


def measure_speed(scorers: Mapping[str, Scorer], batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Time the engines of this machine, not the emulated graphs, in turns on one query's pairs."""
    ways = {
        name: partial(score_all, score, batches)
        for name, score in scorers.items()
        if name != REFERENCE and not name.endswith(GRAPH)
    }
    if not ways:
        return []
    timings = interleave(ways, pairs=sum(map(len, batches)), num_rounds=NUM_TURNS)
    return timings_json(timings)


def score_all(score: Scorer, batches: Sequence[Batch]) -> Float32:
    """Return the scores of all `batches`."""
    return np.concatenate([score(batch) for batch in batches])


def demo_samples(folder: Path, bundle: Path, num_queries: int | None = None) -> StoreSamples:
    """Open the scenes and queries that a finished demo left in `folder`."""
    store, queries = folder / "scenes.store", folder / "queries.jsonl"
    return StoreSamples.open(store, bundle, queries, max_queries=num_queries)


def open_scorers(
    bundle: Path, pairs: Samples, scratch: Path, stack: ExitStack, progress: Progress
) -> tuple[dict[str, Scorer], dict[str, Any]]:
    """Open float32, every precision's graph, and the engines of this machine's backends."""
    manifest = BundleManifest.read(bundle)
    profile = EngineOptions().profile(manifest.text.max_wordpieces)
    scorers: dict[str, Scorer] = {REFERENCE: reference_scorer(bundle)}
    plans: dict[str, Any] = {}
    for name, recipe in {**EMULATED, **UNBOUND}.items():
        progress(f"preparing: {name}")
        graph, source = scratch / "graph.onnx", bundle / JOINT_ENCODER
        recipe = replace(recipe, calibration=pairs)
        try:
            plans[name] = prepare_graph(source, graph, recipe, manifest, profile, progress)
        except EngineError as error:  # limits that do not hold: that is a figure, too
            plans[name] = {"refused": str(error)}
            continue
        scorers[f"{name}{GRAPH}"] = scorer(Graph.read(graph))
    for status in probe_backends(("openvino", "onnxruntime")):
        for precision in (each for each in FOR_REAL if each in status.usable):
            folder = scratch / f"{status.name}-{precision}"
            arguments: dict[str, Any] = {"calibration": pairs, "progress": progress}
            name = f"{precision}, {status.name} {status.version}"
            built = build_engine(
                bundle, folder, backend=status.name, precision=precision, **arguments
            )
            plans[name] = {**built.precision_plan, "build_seconds": built.build_seconds}
            engine = stack.enter_context(closing(open_engine(folder)))
            scorers[name] = engine_scorer(engine)
    return scorers, plans


def measure_tokens(
    demo: Path, num_queries: int | None, scratch: Path, progress: Progress
) -> dict[str, Any]:
    """Measure what int8 tokens do to the ranking, and what reading them costs."""
    lines = read_text(demo / "queries.jsonl").splitlines()[:num_queries]
    queries = [json.loads(line) for line in lines]
    rows = measure_ranking(demo, queries, scratch, progress)
    gather = measure_gathers(scratch)
    where = conditions(
        queries=len(queries),
        candidates=len(queries[0]["candidates"]),
        backend=BACKEND,
        max_loss_of_r1_points=MAX_LOSS_TO_TOKENS,
    )
    broken = [name for name, row in rows.items() if loses_too_much(name, row)]
    return {**where, "rows": rows, "gather": gather, "broken": broken}


def measure_ranking(
    demo: Path, queries: Sequence[Mapping[str, Any]], scratch: Path, progress: Progress
) -> Rows:
    """Rank every query in every way of `TOKENS`; return agreement with the first, and recall."""
    stores = {"float16": demo / "scenes.store", "int8": scratch / "int8.store"}
    quantize_store(stores["float16"], stores["int8"])
    scores: dict[str, list[Float32]] = {}
    for name, (precision, stored, taken) in TOKENS.items():
        engine = scratch / f"{precision}-{taken}"
        if not engine.exists():
            progress(f"building: {precision}, {taken} tokens")
            with demo_samples(demo / "calibration", demo / "bundle") as pairs:
                build_engine(
                    demo / "bundle",
                    engine,
                    backend=BACKEND,
                    precision=precision,
                    calibration=pairs if precision == "int8" else None,
                    options=EngineOptions(token_dtype=taken),
                )
        progress(f"ranking: {name}")
        with Reranker.open(engine, store=stores[stored]) as reranker:
            scores[name] = [
                scores_in_order(reranker, query["query"], query["candidates"]) for query in queries
            ]
    targets = [
        ids.index(query["target"]) if query["target"] in ids else None
        for query in queries
        for ids in [query["candidates"]]
    ]
    return compare(scores, targets, FLOAT16_TOKENS)


def quantize_store(source: Path, target: Path) -> None:
    """Make an int8 store of a float16 one, as indexing with `--dtype int8` would."""
    with TokenStore.open(source) as store:
        num_tokens, hidden = store.record_shape
        with TokenStore.create(
            target,
            num_tokens=num_tokens,
            hidden=hidden,
            dtype="int8",
            fingerprint_encoder=store.fingerprint_encoder,
        ) as made:
            for batch in store.iterate():
                made.append(batch.ids, batch.tokens)


def compare(
    scores: Mapping[str, Sequence[Float32]], targets: Sequence[int | None], reference: str
) -> Rows:
    """Return each row's recall, its loss of R@1 and its agreement with the row `reference`.

    Raises:
        EdjeError: no query knows its target.
    """
    rows: Rows = {}
    exact = recall(scores[reference], targets)
    for name, own in scores.items():
        shares = recall(own, targets)
        if exact is None or shares is None:
            raise EdjeError("no query of the demo knows its target")
        loss = 100 * (exact["R@1"] - shares["R@1"])
        agreement = asdict(rank_agreement(scores[reference], own))
        rows[name] = {**agreement, **shares, "loss_of_r1_points": round(loss, 4)}
    return rows


def loses_too_much(name: str, row: Mapping[str, Any]) -> bool:
    """Tell whether int8 tokens alone lose more than expected: precision int8 is not judged."""
    return bool(TOKENS[name][0] == "fp32" and row["loss_of_r1_points"] > MAX_LOSS_TO_TOKENS)


def measure_gathers(scratch: Path) -> dict[str, Any]:
    """Gather random full-size records of both stores; return times and bytes an image.

    Raises:
        EdjeError: what was read is not what was written.
    """
    tokens, sizes = random_tokens(NUM_RECORDS, full_size()), full_size()
    numbers = np.random.default_rng(0).integers(0, NUM_RECORDS, GATHERED)
    written = tokens[numbers]
    stores, rows = {}, {}
    with ExitStack() as stack:
        for dtype in ("float16", "int8"):
            path = scratch / f"full-size-{dtype}"
            write_store(path, tokens, dtype=dtype).close()
            stores[dtype] = stack.enter_context(TokenStore.open(path))
            rows[dtype] = stores[dtype].rows([image_id(number) for number in numbers.tolist()])
        plain, dequantised = np.empty_like(written), np.empty_like(written)
        values, scales = np.empty(written.shape, np.int8), np.empty(written.shape[:2], np.float16)
        source = Float16Tokens(stores["int8"])
        ways: dict[str, Callable[[], object]] = {
            "float16": lambda: stores["float16"].read(rows["float16"], plain),
            AS_STORED: lambda: stores["int8"].read(rows["int8"], values, scales),
            DEQUANTISED: lambda: source.read(rows["int8"], dequantised),
        }
        for way in ways.values():
            way()
        timings = interleave(ways, pairs=GATHERED, num_rounds=NUM_ROUNDS)
        bytes_an_image = {
            dtype: round(store.stat().total_bytes / NUM_RECORDS, 1)
            for dtype, store in stores.items()
        }
    read: tuple[Array, ...] = (plain, values, scales, dequantised)
    quantised = quantize_tokens(written)
    expected: tuple[Array, ...] = (written, *quantised, dequantize_tokens(*quantised))
    if not all(np.array_equal(got, put) for got, put in zip(read, expected, strict=True)):
        raise EdjeError("the gathers read something else than was written")
    extra_ms = timings[DEQUANTISED].min_ms - timings[AS_STORED].min_ms
    shape = f"{sizes.num_tokens} x {sizes.hidden}"
    return {
        "one_run": f"{GATHERED} random records of {NUM_RECORDS}, {shape}, verified",
        "records": timings_json(timings),
        "dequantise_us_a_record": round(extra_ms * 1e3 / GATHERED, 1),
        "bytes_an_image": bytes_an_image,
    }


def summary(result: Mapping[str, Any]) -> str:
    """Return the rows as Markdown, and the gathers where they were measured."""
    lines = [
        "| | R@1 | R@5 | lost points | tau | top 1 | max difference | mean |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"| {name} | {100 * row['R@1']:.1f} % | {100 * row['R@5']:.1f} % "
            f"| {row['loss_of_r1_points']:.2f} | {row['kendall_tau']:.4f} "
            f"| {100 * row['top_1']:.1f} % | {row['max_abs_diff']:.2g} "
            f"| {row['mean_abs_diff']:.2g} |"
        )
    lines += [kept_line(name, plan) for name, plan in result.get("plans", {}).items()]
    if result.get("speed"):
        lines.append(timings_table(result["speed"]))
    if "gather" in result:
        lines.append(timings_table(result["gather"]["records"]))
    return "\n".join([*lines, *(f"LOSES TOO MUCH: {name}" for name in result["broken"])])


def kept_line(name: str, plan: Mapping[str, Any]) -> str:
    """Return what a plan leaves in more bits than 8, in one line."""
    if "refused" in plan:
        return f"{name}: refused, {plan['refused'].splitlines()[0]}"
    if "quantized" not in plan:
        return f"{name}: all in {plan['compute_type']}"
    kept = [group.removeprefix("layers.") for group in plan["kept"]]
    never = [group.removeprefix("layers.") for group in plan.get("never_quantized", {})]
    total = len(plan["quantized"]) + len(kept)
    more = f", never {', '.join(never)}" if never else ""
    names = f": {', '.join(kept)}" if kept else ""
    return f"{name}: {plan['scales']} scales, kept {len(kept)} of {total}{more}{names}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write `fidelity.json` or `int8_tokens.json`; 1 where a limit is broken."""
    parser = command_line("fidelity", __doc__)
    parser.add_argument("demo", type=Path, help="folder written by `edje demo`")
    parser.add_argument("--queries", type=int, help="use no more; default: all")
    parser.add_argument("--tokens", action="store_true", help="int8 tokens, not precisions")
    parser.add_argument("--model", default="the demo's", help="what it is, in words for the JSON")
    options = parser.parse_args(arguments)
    if options.tokens and options.name == "fidelity":
        options.name = "int8_tokens"
    measure = measure_tokens if options.tokens else measure_precisions
    given = options.demo, options.queries
    return run_benchmark(
        options, lambda *more: {"model": options.model, **measure(*given, *more)}, summary
    )


if __name__ == "__main__":
    sys.exit(main())
