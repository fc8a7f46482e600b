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

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import Float32
from ..bundle import BundleManifest
from ..engines.builder.cache import cached_engine
from ..engines.contract import INPUTS, Batch, Engine, OpenOptions
from ..engines.cpu import PAIRS_PER_THREAD, pairs_per_forward
from ..engines.manifest import EngineManifest
from ..engines.registry import load_backend, open_engine
from ..engines.samples import RandomSamples
from ..errors import EdjeError
from ..kernels.device.host import InlineStream
from ..machine import usable_cores
from ..runtime.reranker import Reranker
from ..runtime.store import TokenStore
from .harness import (
    add_out_option,
    conditions,
    interleave,
    speedup,
    table,
    timings_json,
    write_result,
)
from .random_model import CACHE, full_size_bundle, query_of, source_hash

Scorer = Callable[[], Float32]

FLOAT32_TOLERANCE = 1e-3
BF16_TOLERANCE = 0.2  # random weights, scores of a few units; see `fidelity` for the mean
LARGE_BATCH = 256
EXPECTED_SHARE, EXPECTED_SPEEDUP = 0.95, 1.8


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured: one query of `num_wordpieces` over `num_candidates`, in `num_rounds`."""

    num_candidates: int
    num_wordpieces: int
    num_rounds: int
    num_threads: int | None


@dataclass(frozen=True, slots=True)
class Request:
    """The same pairs twice: as ids of a store, and as arrays that lie ready."""

    query: str
    ids: list[str]
    store: Path
    text_ids: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.float16]

    def batch(self, start: int, size: int) -> Batch:
        """Return pairs `start` and following as arrays; the tokens are a view."""
        tokens = self.tokens[start : start + size]
        queries = np.zeros(len(tokens), np.int32)
        length = np.array([np.count_nonzero(self.text_ids)], np.int32)
        return Batch(self.text_ids, length, queries, tokens)

    def batches(self, size: int) -> list[Batch]:
        """Return all pairs in batches of `size`."""
        return [self.batch(start, size) for start in range(0, len(self.tokens), size)]


def run_benchmark(settings: Settings, scratch: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure; return conditions, timings, ratios and the largest score differences.

    Raises:
        EdjeError: contestants disagree on the scores.
    """
    tell("exporting the full-size model (cached in .cache/)")
    bundle = full_size_bundle()
    openvino = engine_of(bundle, "openvino", "fp32", tell)
    onnxruntime = engine_of(bundle, "onnxruntime", "fp32", tell)
    why_no_bf16 = load_backend("openvino").why_not("bf16")
    fast = openvino if why_no_bf16 else engine_of(bundle, "openvino", "bf16", tell)
    request = make_request(openvino, settings, scratch)
    tell("comparing Reranker.rank with the bare OpenVINO library")
    overhead = compare_with_bare(openvino, request, settings)
    tell("comparing OpenVINO with ONNX Runtime")
    engines = compare_engines([fast, onnxruntime], request, settings)
    return {
        "conditions": conditions(
            model="12 layers, hidden 384, FFN 1536, 64 tokens, random weights",
            candidates=settings.num_candidates,
            wordpieces=settings.num_wordpieces,
            rounds=settings.num_rounds,
            threads=settings.num_threads or "all",
        ),
        "rank_against_bare_openvino": overhead,
        "openvino_against_onnxruntime": {**engines, "why_no_bf16": why_no_bf16},
    }


def engine_of(bundle: Path, backend: str, precision: str, tell: Callable[[str], None]) -> Path:
    """Return an engine of the cached bundle, built once for every state of the sources."""
    return cached_engine(
        bundle,
        CACHE / f"engines-{source_hash('engines')}",
        backend=backend,
        precision=precision,
        calibration=RandomSamples(BundleManifest.read(bundle)),
        progress=tell,
    )


def make_request(engine: Path, settings: Settings, scratch: Path) -> Request:
    """Fill a token store with random tokens; return it beside the same tokens as arrays."""
    bundle: BundleManifest = EngineManifest.read(engine).bundle
    sizes = bundle.sizes
    random = np.random.default_rng(0)
    shape = (settings.num_candidates, sizes.num_tokens, sizes.hidden)
    tokens = random.standard_normal(shape, np.float32).astype(np.float16)
    ids = [f"images/{index:06}.jpg" for index in range(settings.num_candidates)]
    store = scratch / "tokens.store"
    opened = TokenStore.create(
        store,
        num_tokens=sizes.num_tokens,
        hidden=sizes.hidden,
        fingerprint_encoder=bundle.fingerprint_encoder,
    )
    opened.append(ids, tokens)
    opened.close()
    return Request(
        query_of(settings.num_wordpieces), ids, store, text_ids(engine, settings), tokens
    )


def text_ids(engine: Path, settings: Settings) -> npt.NDArray[np.int32]:
    """Return the query as the reranker tokenises it, padded to its bucket."""
    from ..runtime.text import QueryTokenizer

    manifest = EngineManifest.read(engine)
    queries = QueryTokenizer.open(engine, manifest.bundle.text)([query_of(settings.num_wordpieces)])
    length = int(queries.text_length[0])
    if length != settings.num_wordpieces + 2:
        raise EdjeError(f"the query has {length - 2} wordpieces, not {settings.num_wordpieces}")
    bucket = min(bucket for bucket in manifest.profile.text_buckets if bucket >= length)
    padded = np.zeros((1, bucket), np.int32)
    padded[0, :length] = queries.text_ids[0, :length]
    return padded


def compare_with_bare(engine: Path, request: Request, settings: Settings) -> dict[str, Any]:
    """Time `Reranker.rank` and the bare library at several batch sizes, in turns."""
    whole = pairs_per_forward(settings.num_threads)
    with Reranker.open(engine, store=request.store, num_threads=settings.num_threads) as reranker:
        contestants = {
            "Reranker.rank": rank_scorer(reranker, request),
            f"bare OpenVINO, a stream a core, batches of {PAIRS_PER_THREAD}": queued_scorer(
                bare_openvino(engine, settings.num_threads, settings.num_threads or usable_cores()),
                request.batches(PAIRS_PER_THREAD),
            ),
        }
        one_stream = bare_openvino(engine, settings.num_threads, 1)
        contestants |= {
            f"bare OpenVINO, one stream, batches of {size}": bare_scorer(
                one_stream, request.batches(size)
            )
            for size in sorted({whole, LARGE_BATCH})
        }
        difference = check_agreement(contestants, FLOAT32_TOLERANCE)
        timings = interleave(contestants, pairs=len(request.ids), num_rounds=settings.num_rounds)
    ranked, *loops = timings.values()
    best = max(loops, key=lambda timing: timing.pairs_per_s)
    print(table(timings))
    return {
        "timings": timings_json(timings),
        "best_bare": best.name,
        "share_of_bare": round(speedup(ranked, best), 4),
        "expected_share": EXPECTED_SHARE,
        "max_abs_diff": difference,
    }


def compare_engines(
    folders: Sequence[Path], request: Request, settings: Settings
) -> dict[str, Any]:
    """Time two engines through the contract, the faster one first, in turns."""
    engines = [open_engine(folder, OpenOptions(settings.num_threads)) for folder in folders]
    manifests = [engine.manifest for engine in engines]
    size = min(manifest.profile.max_pairs for manifest in manifests)
    contestants = {
        f"{m.backend} {m.precision}": engine_scorer(engine, request.batches(size))
        for engine, m in zip(engines, manifests, strict=True)
    }
    low = any(manifest.precision != "fp32" for manifest in manifests)
    difference = check_agreement(contestants, BF16_TOLERANCE if low else FLOAT32_TOLERANCE)
    timings = interleave(contestants, pairs=len(request.ids), num_rounds=settings.num_rounds)
    for engine in engines:
        engine.close()
    first, second = timings.values()
    print(table(timings))
    return {
        "timings": timings_json(timings),
        "speedup": round(speedup(first, second), 4),
        "expected_speedup": EXPECTED_SPEEDUP if low else None,
        "max_abs_diff": difference,
    }


def check_agreement(contestants: dict[str, Scorer], tolerance: float) -> float:
    """Run everybody once, which also warms them up; return the largest difference to the first.

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


def rank_scorer(reranker: Reranker, request: Request) -> Scorer:
    """Return `Reranker.rank` over all candidates, giving scores in the candidates' order."""

    def score() -> Float32:
        scores = np.full(len(request.ids), np.nan, np.float32)
        for hit in reranker.rank(request.query, request.ids):
            scores[hit.index] = hit.score
        return scores

    return score


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
    import openvino as ov

    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": num_streams,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    if num_threads is not None:
        settings["INFERENCE_NUM_THREADS"] = num_threads
    return ov.Core().compile_model(engine / "joint_encoder.xml", "CPU", settings)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print a table, write `end_to_end.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m edje.perf.bench_end_to_end", description=__doc__
    )
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--wordpieces", type=int, default=13)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--name", default="end_to_end", help="of the JSON file")
    add_out_option(parser)
    options = parser.parse_args(arguments)
    settings = Settings(options.candidates, options.wordpieces, options.rounds, options.threads)
    try:
        with TemporaryDirectory() as scratch:
            result = run_benchmark(settings, Path(scratch), lambda line: print(f"... {line}"))
    except EdjeError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(result))
    print(f"written to {write_result(options.name, result, options.out)}")
    return 0


def summary(result: dict[str, Any]) -> str:
    """Return the two figures in words."""
    overhead = result["rank_against_bare_openvino"]
    engines = result["openvino_against_onnxruntime"]
    names = [timing["name"] for timing in engines["timings"]]
    lines = [
        f"Reranker.rank reaches {overhead['share_of_bare']:.1%} of {overhead['best_bare']} "
        f"(expected: {EXPECTED_SHARE:.0%} or more)",
        f"{names[0]} reaches {engines['speedup']:.2f} times the pairs/s of {names[1]}",
    ]
    if engines["why_no_bf16"]:
        lines.append(f"OpenVINO bf16 was not measured: {engines['why_no_bf16']}")
    where = result["conditions"]
    lines.append(
        f"({where['cpu']}, {where['cores']} cores, threads {where['threads']}, "
        f"{where['candidates']} candidates, {where['wordpieces']} wordpieces, "
        f"load {where['load_average'][0]}, commit {where['commit']})"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
