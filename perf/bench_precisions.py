"""`make bench`: int8 and float32 on the CPU against each other and against plain PyTorch.

Full-size scorer with random weights, one query, batches of 32 and of 256 pairs. Expected: OpenVINO
int8 at 3.3 times ONNX Runtime's float32 pairs/s and at 5.5 times those of the Hugging Face scorer
that the official evaluation runs. Every contestant's scores are compared before anything is
reported; with random weights int8 shows its speed, not what it does to a ranking.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import numpy as np

from ..engines.agreement import kendall_tau
from ..engines.contract import OpenOptions
from ..engines.registry import load_backend, open_engine
from ..errors import EdjeError
from .bench_end_to_end import Scorer, engine_scorer, make_pairs
from .harness import (
    Progress,
    command_line,
    conditions,
    conditions_line,
    interleave,
    run_benchmark,
    speedup,
    timings_json,
    timings_table,
)
from .random_model import DESCRIPTION, full_size_bundle, full_size_engine
from .scorers import official_scorer

FAST, FLOAT32, OFFICIAL = "openvino int8", "onnxruntime fp32", "Hugging Face fp32"
ENGINES = (FAST, "openvino bf16", "openvino fp32", "onnxruntime int8", FLOAT32)
EXPECTED = {FLOAT32: 3.3, OFFICIAL: 5.5}
BATCH_SIZES = (32, 256)
FLOAT32_TOLERANCE = 1e-4
LEAST_CORRELATION = 0.95  # of the other precisions' scores; seen for int8: 0.99


def measure(num_rounds: int, num_threads: int | None, progress: Progress) -> dict[str, Any]:
    """Measure; return conditions, and timings, ratios and agreement for every batch size.

    Raises:
        EdjeError: contestants disagree on the scores.
    """
    progress("exporting the full-size model (cached in .cache/)")
    bundle, settings = full_size_bundle(), OpenOptions(num_threads)
    folders, left_out, results = {}, {}, {}
    for name in ENGINES:
        backend, precision = name.split()
        reason = load_backend(backend).why_not(precision)
        if reason is None:
            folders[name] = full_size_engine(bundle, backend, precision, progress)
        else:
            left_out[name] = reason
    pairs = make_pairs(folders[FLOAT32], max(BATCH_SIZES))
    official = official_scorer(num_threads)
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(closing(open_engine(folder, settings)))
            for name, folder in folders.items()
        }
        for size in BATCH_SIZES:
            batch = pairs.batch(0, size)
            scorers = {name: engine_scorer(engine, [batch]) for name, engine in engines.items()}
            scorers[OFFICIAL] = partial(official, batch)
            progress(f"batches of {size}: {', '.join(scorers)}")
            rounds = max(num_rounds, num_rounds * max(BATCH_SIZES) // size // 2)
            results[f"batch_{size}"] = compare(scorers, size, rounds)
    return {
        "conditions": conditions(
            model=DESCRIPTION,
            wordpieces=pairs.num_wordpieces,
            text_slots=pairs.text_ids.shape[1],
            threads=num_threads or "all",
        ),
        "expected_speedup": EXPECTED,
        "left_out": left_out,
        **results,
    }


def compare(scorers: Mapping[str, Scorer], num_pairs: int, num_rounds: int) -> dict[str, Any]:
    """Check everybody's scores, which also warms them up; time them in turns."""
    agreement = check_scores(scorers)
    timings = interleave(scorers, pairs=num_pairs, num_rounds=num_rounds)
    fast = timings.get(FAST)
    return {
        "timings": timings_json(timings),
        "rounds": num_rounds,
        "speedup_of_openvino_int8": {}
        if fast is None
        else {name: round(speedup(fast, timing), 3) for name, timing in timings.items()},
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


def summary(result: Mapping[str, Any]) -> str:
    """Return a table a batch size, and the ratios in words."""
    lines = []
    for size in BATCH_SIZES:
        measured = result[f"batch_{size}"]
        lines.append(timings_table(measured["timings"]))
        lines += [
            f"batches of {size}: {FAST} reaches {ratio:.2f} times the pairs/s of {rival} "
            f"(expected: {EXPECTED[rival]} or more)"
            for rival, ratio in measured["speedup_of_openvino_int8"].items()
            if rival in EXPECTED
        ]
    lines += [f"{name} was not measured: {why}" for name, why in result["left_out"].items()]
    where = conditions_line(result["conditions"], "threads", "wordpieces", "text_slots")
    return "\n".join([*lines, where])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its tables, write `precisions.json`."""
    parser = command_line("precisions", __doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of every engine; default: a thread a core")
    options = parser.parse_args(arguments)
    given = options.rounds, options.threads
    return run_benchmark(options, lambda scratch, progress: measure(*given, progress), summary)


if __name__ == "__main__":
    sys.exit(main())
