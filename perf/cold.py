"""What a user waits for who types `edje rerank`: from the start of the process to its answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..engines.manifest import EngineManifest
from ..errors import EdjeError
from ..runtime.text import QueryTokenizer
from ..show import progress_bar
from .measure import scratch_folder
from .random_model import full_size_bundle, full_size_engine
from .report import Measured, benchmark_json
from .subjects import query_of_length, random_store

GROUP = "cold"
CANDIDATES, TOP_K, WORDPIECES = 100, 10, 13
NUM_RUNS = 5
EXPECTED_S = 2.5


def measure_cold(engine: Path | None = None, num_runs: int = NUM_RUNS) -> dict[str, Any]:
    """Run `edje rerank` in a process of its own, a few times; return the result.

    The files lie in the page cache, as after any earlier run. Parts are what the process says of
    itself; `start` is the rest: the interpreter, imports, and the end.

    Raises:
        EdjeError: it fails, or ranks otherwise than before.
    """
    engine = engine or full_size_engine(full_size_bundle(), "openvino", None)
    manifest = EngineManifest.read(engine)
    text = query_of_length(QueryTokenizer.open(engine, manifest.bundle.text), WORDPIECES)
    seconds: list[float] = []
    answers: list[dict[str, Any]] = []
    with scratch_folder() as scratch, progress_bar("cold starts") as update:
        random_store(engine, scratch, CANDIDATES, CANDIDATES, lambda line: None)
        command = [sys.executable, "-m", "edje", "--quiet", "rerank", str(engine)]
        command += ["--store", str(scratch / "tokens.store"), "--query", text]
        command += ["--top-k", str(TOP_K), "--json"]
        for number in range(num_runs + 1):  # the first fills the page cache
            began = perf_counter()
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            took = perf_counter() - began
            if done.returncode:
                raise EdjeError(f"edje rerank failed: {done.stderr}")
            if number:
                seconds.append(took)
                answers.append(json.loads(done.stdout))
            update(number + 1, num_runs + 1)
    _check(answers)
    parts = {
        "open": [one["open_s"] for one in answers],
        "warm up": [one["warm_up_s"] for one in answers],
        "rank": [one["timings_ms"]["total"] / 1e3 for one in answers],
    }
    parts["start"] = [
        whole - sum(part[at] for part in parts.values()) for at, whole in enumerate(seconds)
    ]
    where = {"engine": manifest.words, "candidates": CANDIDATES, "wordpieces": WORDPIECES}
    measured = [Measured("edje rerank", GROUP, seconds, pairs=CANDIDATES)]
    measured += [Measured(f"of it: {name}", GROUP, part) for name, part in parts.items()]
    faults = []
    if min(seconds) >= EXPECTED_S:
        faults.append(f"the first answer took {min(seconds):.2f} s, expected under {EXPECTED_S}")
    return benchmark_json(measured, conditions=where, faults=faults)


def _check(answers: Sequence[dict[str, Any]]) -> None:
    """Refuse answers that are not all the same ranking."""
    ids = [[hit["id"] for hit in one["hits"]] for one in answers]
    scores = np.array([[hit["score"] for hit in one["hits"]] for one in answers])
    if (
        any(one != ids[0] or len(one) != TOP_K for one in ids)
        or np.ptp(scores, axis=0).max() > 1e-4
    ):
        raise EdjeError("edje rerank ranked otherwise than before; nothing is reported")
