"""What the pipeline itself costs: the engine takes no time, so all that is left is ours.

    edje bench pipeline

Full-size records (64 tokens x 384, float16) in batches of 64 pairs on the host device. The engine
copies each image's first token value into its score, so every score is known. In turns, in one
process:

- own cost: `Pipeline.run` over a source that writes one value a record, against a plain loop that
  asks the same source and runs the same engine on the calling thread. The difference, a batch, is
  what slots, streams, events and plans cost. Expected: less than 100 us.
- gather: `Pipeline.run` over a store in the page cache, against `TokenStore.read` of the same rows
  into as many buffers as the pipeline has slots (one would stay in the processor's caches).
  Expected: at least 80 % of its records/s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Float16, Float32, Int64
from ..bundle import BundleManifest, TextSpec
from ..engines.contract import Batch
from ..engines.manifest import EngineManifest, Profile
from ..errors import EdjeError
from ..kernels.device.host import HostDevice, InlineStream
from ..runtime.pipeline import NUM_SLOTS, Pipeline, Request
from ..runtime.source import TokenSource
from ..runtime.store import TokenStore
from ..runtime.text import TokenizedQueries
from .free_engine import FreeEngine, OneValue, free_manifest
from .harness import (
    Timing,
    command_line,
    conditions,
    interleave,
    run_rounds,
    speedup,
    timings_json,
    timings_table,
)
from .random_model import HIDDEN, NUM_TOKENS, full_size, write_store

NUM_RECORDS, NUM_PAIRS, MAX_PAIRS = 2048, 4096, 64
NUM_WORDPIECES, BUCKET = 13, 16
NUM_ROUNDS = 40
FINGERPRINT = "0" * 64
PIPELINE, LOOP, READ = "pipeline", "plain loop", "store read"
MAX_COST_US, LEAST_GATHER_SHARE = 100.0, 0.8


def measure(num_rounds: int, scratch: Path) -> dict[str, Any]:
    """Measure both; the store goes into `scratch`.

    Raises:
        EdjeError: a score is wrong.
    """
    engine, device = FreeEngine(manifest_for(MAX_PAIRS)), HostDevice()
    values = np.arange(NUM_RECORDS, dtype=np.float16)[:, None, None] % 1000
    write_store(
        scratch / "store", np.broadcast_to(values, (NUM_RECORDS, NUM_TOKENS, HIDDEN)),
        encoder=FINGERPRINT,
    ).close()  # fmt: skip
    with TokenStore.open(scratch / "store") as store, closing(device):
        picked = np.random.default_rng(7).integers(0, NUM_RECORDS, NUM_PAIRS)
        rivals: dict[str, tuple[TokenSource, Callable[[Request], Float32], Int64]] = {
            LOOP: (OneValue(), _plain_loop(engine), picked),
            READ: (store, _reading(store), store.live_rows()[picked]),
        }
        own, gather = (
            _compare(Pipeline(engine, source, device), name, run, _request(rows), num_rounds)
            for name, (source, run, rows) in rivals.items()
        )
    num_batches = -(-NUM_PAIRS // MAX_PAIRS)
    cost_us = (own[PIPELINE].min_ms - own[LOOP].min_ms) * 1e3 / num_batches
    share = speedup(gather[PIPELINE], gather[READ])
    return {
        "conditions": conditions(
            record=f"{NUM_TOKENS} x {HIDDEN} float16",
            records=NUM_RECORDS,
            pairs=NUM_PAIRS,
            pairs_per_batch=MAX_PAIRS,
            rounds=num_rounds,
        ),
        "own_cost": timings_json(own),
        "own_cost_us_per_batch": round(cost_us, 1),
        "gather": timings_json(gather),
        "share_of_gather_speed": round(share, 3),
        "faults": faults_of(cost_us, share),
    }


def _compare(
    pipeline: Pipeline,
    rival: str,
    run_rival: Callable[[Request], Float32],
    request: Request,
    num_rounds: int,
) -> dict[str, Timing]:
    """Time the pipeline against `rival`; both must give the same right scores, before and after."""
    runs = {PIPELINE: lambda: pipeline.run(request).scores, rival: lambda: run_rival(request)}
    _check(runs)
    timings = interleave(runs, pairs=NUM_PAIRS, num_rounds=num_rounds)
    _check(runs)
    pipeline.close()
    return timings


def _check(runs: dict[str, Callable[[], Float32]]) -> None:
    expected = np.random.default_rng(7).integers(0, NUM_RECORDS, NUM_PAIRS) % 1000
    for name, run in runs.items():
        if not np.array_equal(run(), expected.astype(np.float32)):
            raise EdjeError(f"{name} gives wrong scores")


def _plain_loop(engine: FreeEngine) -> Callable[[Request], Float32]:
    """Return a loop over ready arrays: what any caller of the engine would have to do."""
    source, stream, queries = OneValue(), InlineStream(), one_query()
    first = np.zeros(MAX_PAIRS, np.int32)

    def score(rows: Int64, tokens: Float16, scores: Float32) -> None:
        source.read(rows, tokens)
        batch = Batch(queries.text_ids, queries.text_length, first[: len(rows)], tokens)
        engine.enqueue(batch, scores, stream=stream)

    return _in_batches(score, num_buffers=1)


def _reading(store: TokenStore) -> Callable[[Request], Float32]:
    """Return the store's own gather of a request, into as many buffers as the pipeline has."""

    def score(rows: Int64, tokens: Float16, scores: Float32) -> None:
        store.read(rows, tokens, bad="mark")
        scores[:] = tokens[:, 0, 0]

    return _in_batches(score, num_buffers=NUM_SLOTS)


def _in_batches(
    score: Callable[[Int64, Float16, Float32], None], num_buffers: int
) -> Callable[[Request], Float32]:
    """Return what scores a request batch by batch, the buffers of tokens taking turns."""
    shape = (MAX_PAIRS, NUM_TOKENS, HIDDEN)
    buffers = [np.zeros(shape, np.float16) for _ in range(num_buffers)]

    def run(request: Request) -> Float32:
        scores = np.empty(len(request.rows), np.float32)
        for number, start in enumerate(range(0, len(scores), MAX_PAIRS)):
            rows = request.rows[start : start + MAX_PAIRS]
            tokens = buffers[number % num_buffers][: len(rows)]
            score(rows, tokens, scores[start : start + MAX_PAIRS])
        return scores

    return run


def _request(rows: Int64) -> Request:
    return Request(one_query(), np.zeros(NUM_PAIRS, np.int64), rows)


def one_query() -> TokenizedQueries:
    """Return one query's ids, as every request here asks."""
    text_ids = np.zeros((1, BUCKET), np.int32)
    text_ids[:, : NUM_WORDPIECES + 2] = 5
    length = np.array([NUM_WORDPIECES + 2], np.int32)
    return TokenizedQueries(text_ids, length, np.zeros(1, np.bool_))


def manifest_for(max_pairs: int) -> EngineManifest:
    """Return the manifest of an engine that nobody built, for batches of so many pairs."""
    bundle = BundleManifest(
        sizes=replace(full_size(), num_tokens=NUM_TOKENS, hidden=HIDDEN),
        text=TextSpec("none", 61, 101, 102, 0),
        image=None,
        fingerprint_encoder=FINGERPRINT,
        fingerprint_scorer=FINGERPRINT,
        provenance={},
    )
    return free_manifest(bundle, Profile(max_pairs, (BUCKET,)))


def faults_of(cost_us: float, share: float) -> list[str]:
    """Return one sentence for each figure that falls short."""
    faults = []
    if cost_us >= MAX_COST_US:
        faults.append(f"a batch costs {cost_us:.0f} us, expected less than {MAX_COST_US:.0f}")
    if share < LEAST_GATHER_SHARE:
        faults.append(
            f"{share:.0%} of the store's own speed, expected {LEAST_GATHER_SHARE:.0%} or more"
        )
    return faults


def summary(result: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    return "\n\n".join(
        [
            *(timings_table(result[part]) for part in ("own_cost", "gather")),
            f"the pipeline costs {result['own_cost_us_per_batch']} us a batch of {MAX_PAIRS}, "
            f"and moves {result['share_of_gather_speed']:.0%} of what the store reads",
            *(f"FALLS SHORT: {fault}" for fault in result["faults"]),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write `pipeline.json`; return 1 where a figure falls short."""
    parser = command_line("pipeline", __doc__)
    return run_rounds(parser, arguments, NUM_ROUNDS, measure, summary)


if __name__ == "__main__":
    sys.exit(main())
