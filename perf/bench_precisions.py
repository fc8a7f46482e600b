"""`make bench`: int8 and float32 on the CPU against each other and against plain PyTorch.

Full-size scorer with random weights, one query, batches of 32 and of 256 pairs. Expected: OpenVINO
int8 at 3.3 times ONNX Runtime's float32 pairs/s and at 5.5 times those of the Hugging Face scorer
that the official evaluation runs. Every contestant's scores are compared before anything is
reported; with random weights int8 shows its speed, not what it does to a ranking.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..engines.agreement import kendall_tau
from ..engines.contract import Batch, OpenOptions
from ..engines.manifest import EngineManifest
from ..engines.registry import load_backend, open_engine
from ..errors import EdjeError
from .bench_end_to_end import Scorer, Settings, engine_of, engine_scorer, text_ids
from .harness import (
    Timing,
    add_out_option,
    conditions,
    interleave,
    speedup,
    table,
    timings_json,
    write_result,
)
from .random_model import full_size_bundle
from .scorers import official_scorer

FAST, FLOAT32, OFFICIAL = "openvino int8", "onnxruntime fp32", "Hugging Face fp32"
ENGINES = (FAST, "openvino bf16", "openvino fp32", "onnxruntime int8", FLOAT32)
EXPECTED = {FLOAT32: 3.3, OFFICIAL: 5.5}
BATCH_SIZES = (32, 256)
FLOAT32_TOLERANCE = 1e-4
LEAST_CORRELATION = 0.95  # of the other precisions' scores; seen for int8: 0.99

Tell = Callable[[str], None]


def run_benchmark(settings: Settings, tell: Tell) -> dict[str, Any]:
    """Measure; return conditions, and timings, ratios and agreement for every batch size.

    Raises:
        EdjeError: contestants disagree on the scores.
    """
    tell("exporting the full-size model (cached in .cache/)")
    bundle = full_size_bundle()
    left_out = {name: reason for name in ENGINES if (reason := _why_not(name))}
    folders = {
        name: engine_of(bundle, backend, precision, tell)
        for name in ENGINES
        if name not in left_out
        for backend, precision in [name.split()]
    }
    pairs = make_batch(folders[FLOAT32], settings)
    official = official_scorer(settings.num_threads)
    sizes = [size for size in BATCH_SIZES if size <= len(pairs)]
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(
                closing(open_engine(folder, OpenOptions(settings.num_threads)))
            )
            for name, folder in folders.items()
        }
        results = {}
        for size in sizes:
            batch = pairs.part(slice(size))
            scorers = {name: engine_scorer(engine, [batch]) for name, engine in engines.items()}
            scorers[OFFICIAL] = partial(official, batch)
            tell(f"batches of {size}: {', '.join(scorers)}")
            num_rounds = max(settings.num_rounds, settings.num_rounds * max(sizes) // size // 2)
            results[f"batch_{size}"] = compare(scorers, size, num_rounds)
    return {
        "conditions": conditions(
            model="12 layers, hidden 384, FFN 1536, 64 tokens, random weights",
            wordpieces=settings.num_wordpieces,
            text_slots=pairs.text_ids.shape[1],
            threads=settings.num_threads or "all",
        ),
        "expected_speedup": EXPECTED,
        "left_out": left_out,
        **results,
    }


def make_batch(engine: Path, settings: Settings) -> Batch:
    """Return one query with random candidates."""
    sizes = EngineManifest.read(engine).bundle.sizes
    shape = (settings.num_candidates, sizes.num_tokens, sizes.hidden)
    tokens = np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)
    length = np.array([settings.num_wordpieces + 2], np.int32)
    queries = np.zeros(len(tokens), np.int32)
    return Batch(text_ids(engine, settings), length, queries, tokens)


def compare(scorers: Mapping[str, Scorer], num_pairs: int, num_rounds: int) -> dict[str, Any]:
    """Check everybody's scores, which also warms them up; time them in turns."""
    agreement = check_scores(scorers)
    timings = interleave(scorers, pairs=num_pairs, num_rounds=num_rounds)
    print(table(timings))
    return {
        "timings": timings_json(timings),
        "rounds": num_rounds,
        "speedup_of_openvino_int8": speedups(timings),
        "agreement_with_onnxruntime_fp32": agreement,
    }


def check_scores(scorers: Mapping[str, Scorer]) -> dict[str, dict[str, float]]:
    """Compare every contestant's scores with ONNX Runtime's in float32.

    Raises:
        EdjeError: float32 scores that differ, or others that do not follow them.
    """
    expected = scorers[FLOAT32]()
    facts, faults = {}, []
    for name, scorer in scorers.items():
        scores = scorer()
        difference = float(np.abs(scores - expected).max())
        correlation = float(np.corrcoef(scores, expected)[0, 1])
        facts[name] = {
            "max_abs_diff": difference,
            "correlation": round(correlation, 6),
            "kendall_tau": round(kendall_tau(expected, scores), 6),
        }
        if name.endswith("fp32") and not difference <= FLOAT32_TOLERANCE:
            faults.append(f"{name}: off by {difference:.2e}, expected <= {FLOAT32_TOLERANCE:.0e}")
        if not correlation >= LEAST_CORRELATION:
            faults.append(f"{name}: correlation {correlation:.3f}, expected >= {LEAST_CORRELATION}")
    if faults:
        raise EdjeError("contestants disagree on the scores; nothing is reported", faults=faults)
    return facts


def speedups(timings: Mapping[str, Timing]) -> dict[str, float]:
    """Return how many times everybody's pairs/s OpenVINO int8 reaches; empty without it."""
    fast = timings.get(FAST)
    if fast is None:
        return {}
    return {name: round(speedup(fast, timing), 3) for name, timing in timings.items()}


def _why_not(name: str) -> str | None:
    backend, precision = name.split()
    return load_backend(backend).why_not(precision)


def summary(result: Mapping[str, Any]) -> str:
    """Return the ratios in words."""
    lines = [
        f"batches of {size}: {FAST} reaches {ratios[rival]:.2f} times the pairs/s of {rival} "
        f"(expected: {least} or more)"
        for size in BATCH_SIZES
        if (ratios := result.get(f"batch_{size}", {}).get("speedup_of_openvino_int8"))
        for rival, least in EXPECTED.items()
    ]
    lines += [f"{name} was not measured: {why}" for name, why in result["left_out"].items()]
    where = result["conditions"]
    lines.append(
        f"({where['cpu']}, {where['cores']} cores, threads {where['threads']}, "
        f"{where['wordpieces']} wordpieces in {where['text_slots']} slots, "
        f"load {where['load_average'][0]}, commit {where['commit']})"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print a table, write `precisions.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m edje.perf.bench_precisions", description=__doc__
    )
    parser.add_argument("--wordpieces", type=int, default=13)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--name", default="precisions", help="of the JSON file")
    add_out_option(parser)
    options = parser.parse_args(arguments)
    settings = Settings(max(BATCH_SIZES), options.wordpieces, options.rounds, options.threads)
    try:
        result = run_benchmark(settings, lambda line: print(f"... {line}", flush=True))
    except EdjeError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(result))
    print(f"written to {write_result(options.name, result, options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
