"""`make bench`: what the online path costs around the engine, and the engines against each other.

Full-size scorer with random weights, one query, a real token store. Two comparisons:

- `Reranker.rank` against the bare OpenVINO library over ready-made arrays: its own queue with a
  stream a core, and plain loops. Expected: at least 95 % of the pairs/s of the best of them.
- OpenVINO in bf16 (where the CPU has it, else in fp32) against ONNX Runtime in fp32. Expected of
  bf16: at least 1.8 times the pairs/s.

The scores of every contestant are compared before anything is reported. Compared is what this
machine can run; what it cannot is named with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Float32
from ..bundle import INPUTS
from ..engines.contract import Batch, Engine, OpenOptions
from ..engines.manifest import EngineManifest
from ..engines.registry import load_backend, open_engine
from ..errors import EdjeError
from ..kernels.device.host import InlineStream
from ..machine import usable_cores
from ..runtime.reranker import Reranker
from .harness import (
    Progress,
    Timing,
    command_line,
    conditions,
    conditions_line,
    interleave,
    run_benchmark,
    scores_in_order,
    speedup,
    timings_json,
    timings_table,
)
from .random_model import (
    DESCRIPTION,
    Pairs,
    full_size_bundle,
    full_size_engine,
    image_id,
    query_ids,
    query_of,
    random_tokens,
    write_store,
)

Scorer = Callable[[], Float32]

FLOAT32_TOLERANCE = 1e-3
BF16_TOLERANCE = 0.2  # random weights, scores of a few units; see `fidelity` for the mean
NUM_CANDIDATES, NUM_WORDPIECES = 512, 13
SMALL_BATCH, LARGE_BATCH = 16, 256
EXPECTED_SHARE, EXPECTED_SPEEDUP = 0.95, 1.8


def measure(
    num_rounds: int, num_threads: int | None, scratch: Path, progress: Progress
) -> dict[str, Any]:
    """Measure; return conditions, timings, ratios and the largest score differences.

    Raises:
        EdjeError: contestants disagree on the scores.
    """
    progress("exporting the full-size model (cached in .cache/)")
    bundle = full_size_bundle()
    openvino = full_size_engine(bundle, "openvino", "fp32", progress)
    onnxruntime = full_size_engine(bundle, "onnxruntime", "fp32", progress)
    why_no_bf16 = load_backend("openvino").why_not("bf16")
    fast = openvino if why_no_bf16 else full_size_engine(bundle, "openvino", "bf16", progress)
    pairs, options = make_pairs(openvino, NUM_CANDIDATES), OpenOptions(num_threads)
    progress("comparing Reranker.rank with the bare OpenVINO library")
    overhead = compare_with_bare(openvino, pairs, scratch / "tokens.store", num_rounds, options)
    progress("comparing OpenVINO with ONNX Runtime")
    engines = compare_engines([fast, onnxruntime], pairs, num_rounds, options)
    return {
        "conditions": conditions(
            model=DESCRIPTION,
            candidates=NUM_CANDIDATES,
            wordpieces=NUM_WORDPIECES,
            rounds=num_rounds,
            threads=num_threads or "all",
        ),
        "rank_against_bare_openvino": overhead,
        "openvino_against_onnxruntime": {**engines, "why_no_bf16": why_no_bf16},
    }


def make_pairs(engine: Path, num_candidates: int) -> Pairs:
    """Return one query, padded to its bucket, with random candidates.

    Raises:
        EdjeError: the engine's tokenizer splits the query otherwise.
    """
    manifest = EngineManifest.read(engine)
    ids = query_ids(engine, manifest.bundle.text, query_of(NUM_WORDPIECES))
    length = ids.shape[1]
    if length != NUM_WORDPIECES + 2:
        raise EdjeError(f"the query has {length - 2} wordpieces, not {NUM_WORDPIECES}")
    bucket = min(bucket for bucket in manifest.profile.text_buckets if bucket >= length)
    padded = np.zeros((1, bucket), np.int32)
    padded[:, :length] = ids
    return Pairs(NUM_WORDPIECES, padded, random_tokens(num_candidates, manifest.bundle.sizes))


def compare_with_bare(
    engine: Path, pairs: Pairs, store: Path, num_rounds: int, options: OpenOptions
) -> dict[str, Any]:
    """Time `Reranker.rank` over a new store and the bare library at several batch sizes."""
    encoder = EngineManifest.read(engine).bundle.fingerprint_encoder
    write_store(store, pairs.tokens, encoder=encoder).close()
    query, threads = query_of(NUM_WORDPIECES), options.num_threads
    ids = [image_id(number) for number in range(len(pairs.tokens))]
    with Reranker.open(engine, store=store, num_threads=threads) as reranker:
        one_stream = bare_openvino(engine, threads, 1)
        contestants: dict[str, Scorer] = {
            "Reranker.rank": partial(scores_in_order, reranker, query, ids),
            f"bare OpenVINO, a stream a core, batches of {SMALL_BATCH}": queued_scorer(
                bare_openvino(engine, threads, threads or usable_cores()),
                pairs.batches(SMALL_BATCH),
            ),
            **{
                f"bare OpenVINO, one stream, batches of {size}": bare_scorer(
                    one_stream, pairs.batches(size)
                )
                for size in sorted({SMALL_BATCH * (threads or usable_cores()), LARGE_BATCH})
            },
        }
        result, (ranked, *loops) = compare(contestants, FLOAT32_TOLERANCE, len(ids), num_rounds)
    best = max(loops, key=lambda timing: timing.pairs_per_s)
    return {
        **result,
        "best_bare": best.name,
        "share_of_bare": round(speedup(ranked, best), 4),
        "expected_share": EXPECTED_SHARE,
    }


def compare_engines(
    folders: Sequence[Path], pairs: Pairs, num_rounds: int, options: OpenOptions
) -> dict[str, Any]:
    """Time two engines through the contract, the faster one first, in turns."""
    with ExitStack() as stack:
        engines = [stack.enter_context(closing(open_engine(folder, options))) for folder in folders]
        manifests = [engine.manifest for engine in engines]
        size = min(manifest.profile.max_pairs for manifest in manifests)
        contestants = {
            f"{m.backend} {m.precision}": engine_scorer(engine, pairs.batches(size))
            for engine, m in zip(engines, manifests, strict=True)
        }
        low = any(manifest.precision != "fp32" for manifest in manifests)
        tolerance = BF16_TOLERANCE if low else FLOAT32_TOLERANCE
        result, (first, second) = compare(contestants, tolerance, len(pairs.tokens), num_rounds)
    expected = EXPECTED_SPEEDUP if low else None
    return {**result, "speedup": round(speedup(first, second), 4), "expected_speedup": expected}


def compare(
    contestants: Mapping[str, Scorer], tolerance: float, num_pairs: int, num_rounds: int
) -> tuple[dict[str, Any], list[Timing]]:
    """Check everybody's scores, which also warms them up; time them in turns."""
    difference = check_agreement(contestants, tolerance)
    timings = interleave(contestants, pairs=num_pairs, num_rounds=num_rounds)
    result = {"timings": timings_json(timings), "max_abs_diff": difference}
    return result, list(timings.values())


def check_agreement(contestants: Mapping[str, Scorer], tolerance: float) -> float:
    """Run everybody once; return the largest difference to the first.

    Raises:
        EdjeError: one lies outside `tolerance`.
    """
    scores = {name: scorer() for name, scorer in contestants.items()}
    first = next(iter(scores.values()))
    differences = {name: float(np.abs(s - first).max()) for name, s in scores.items()}
    faults = [
        f"{name}: {difference:.2e}, expected at most {tolerance:.0e}"
        for name, difference in differences.items()
        if not difference <= tolerance
    ]
    if faults:
        raise EdjeError("contestants disagree on the scores; nothing is reported", faults=faults)
    return max(differences.values())


def engine_scorer(engine: Engine, batches: Sequence[Batch]) -> Scorer:
    """Return a loop over ready-made batches through the engine contract."""
    stream = InlineStream()

    def score() -> Float32:
        parts = [np.empty(len(batch), np.float32) for batch in batches]
        for batch, scores in zip(batches, parts, strict=True):
            engine.enqueue(batch, scores, stream=stream)
        return np.concatenate(parts)

    return score


def bare_openvino(engine: Path, num_threads: int | None, num_streams: int) -> Any:
    """Compile the engine's model with the library alone."""
    from ..engines.openvino_core import openvino_core

    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": num_streams,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    if num_threads is not None:
        settings["INFERENCE_NUM_THREADS"] = num_threads
    return openvino_core().compile_model(engine / "joint_encoder.xml", "CPU", settings)


def queued_scorer(compiled: Any, batches: Sequence[Batch]) -> Scorer:
    """Return a run of the library's own queue, which keeps every stream busy."""
    import openvino as ov

    queue, parts = ov.AsyncInferQueue(compiled), [np.empty(0, np.float32) for _ in batches]
    feeds = [_feed(batch) for batch in batches]

    def keep(request: Any, index: int) -> None:
        parts[index] = request.get_output_tensor(0).data.copy()

    queue.set_callback(keep)

    def score() -> Float32:
        for index, feed in enumerate(feeds):
            queue.start_async(feed, userdata=index, share_inputs=True)
        queue.wait_all()
        return np.concatenate(parts)

    return score


def bare_scorer(compiled: Any, batches: Sequence[Batch]) -> Scorer:
    """Return a loop of the library's own calls over arrays that lie ready."""
    request, feeds = compiled.create_infer_request(), [_feed(batch) for batch in batches]

    def score() -> Float32:
        parts = [request.infer(feed, share_inputs=True)["scores"].copy() for feed in feeds]
        return np.concatenate(parts)

    return score


def _feed(batch: Batch) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in INPUTS}


def summary(result: Mapping[str, Any]) -> str:
    """Return tables, and the two figures in words."""
    overhead = result["rank_against_bare_openvino"]
    engines = result["openvino_against_onnxruntime"]
    names = [timing["name"] for timing in engines["timings"]]
    lines = [
        timings_table(overhead["timings"]),
        f"Reranker.rank reaches {overhead['share_of_bare']:.1%} of {overhead['best_bare']} "
        f"(expected: {EXPECTED_SHARE:.0%} or more)",
        timings_table(engines["timings"]),
        f"{names[0]} reaches {engines['speedup']:.2f} times the pairs/s of {names[1]}",
    ]
    if engines["why_no_bf16"]:
        lines.append(f"OpenVINO bf16 was not measured: {engines['why_no_bf16']}")
    where = conditions_line(result["conditions"], "threads", "candidates", "wordpieces")
    return "\n".join([*lines, where])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print a table, write `end_to_end.json`."""
    parser = command_line("end_to_end", __doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of every engine; default: a thread a core")
    options = parser.parse_args(arguments)
    given = options.rounds, options.threads
    return run_benchmark(options, lambda *more: measure(*given, *more), summary)


if __name__ == "__main__":
    sys.exit(main())
