"""What can be fed at most: an engine that takes no time behind store, pipeline and Python.

    edje bench feed

Full-size records (64 tokens x 384, float16) on the host device; every score is checked. In turns,
in one process:

- feeds: `Pipeline.run` of 4,096 pairs in batches of 64, 256 and 1,024 from a store in the page
  cache (`disk`), from one loaded into memory (`host`), and `disk in Python`, as it is where no
  compiler built the C extension. `make gpu` measures the same on a GPU, from its memory as well.
- lock: how much of a verified read of 64 records by one thread holds Python's lock, and how much
  does not: u and l microseconds a record. n threads read at most min(n / (u + l), 1 / l) records/s.
- threads: as many threads as there are cores read at once, beside that prediction.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any
from unittest.mock import patch

import numpy as np

from ..arrays import Float32, Int64
from ..errors import EdjeError
from ..kernels.device.host import HostDevice
from ..machine import usable_cores
from ..runtime.pipeline import Pipeline, Request
from ..runtime.store import TokenStore
from ..runtime.store import read as reading
from ..runtime.store.unlocked import is_built, read_and_hash
from .bench_pipeline import FINGERPRINT, manifest_for, one_query
from .free_engine import FreeEngine
from .harness import (
    command_line,
    conditions,
    conditions_line,
    interleave,
    run_rounds,
    timings_json,
    timings_table,
)
from .random_model import HIDDEN, NUM_TOKENS, write_store

NUM_RECORDS, NUM_PAIRS, BATCHES = 8192, 4096, (64, 256, 1024)
NUM_ROUNDS, NUM_LOCK_ROUNDS, FEW = 20, 400, 64
MANY_CORES, WANTED = 16, 200_000
DISK, IN_PYTHON, HOST = "disk", "disk in Python", "host"


def measure(num_rounds: int, scratch: Path, num_records: int = NUM_RECORDS) -> dict[str, Any]:
    """Measure all three; the store goes into `scratch`.

    Raises:
        EdjeError: a score is wrong.
    """
    values = (np.arange(num_records) % 1000).astype(np.float16)[:, None, None]
    shape = (num_records, NUM_TOKENS, HIDDEN)
    write_store(scratch / "store", np.broadcast_to(values, shape), encoder=FINGERPRINT).close()
    with ExitStack() as stack:
        stores = opened_stores(stack, scratch / "store")
        picked = np.random.default_rng(7).integers(0, num_records, NUM_PAIRS)
        feeds = interleave(
            dict(feeds_of(stack, stores, picked)), pairs=NUM_PAIRS, num_rounds=num_rounds
        )
        disks = {name: store for name, store in stores.items() if name != HOST}
        lock = {name: lock_of(store) for name, store in disks.items()}
        threads = [row for name, store in disks.items() for row in reads_at_once(name, store, lock)]
    predicted = {name: round(most_reads(MANY_CORES, **each)) for name, each in lock.items()}
    best = max(timing.pairs_per_s for name, timing in feeds.items() if name.startswith(DISK))
    return {
        "conditions": conditions(
            record=f"{NUM_TOKENS} x {HIDDEN} float16",
            records=num_records,
            pairs=NUM_PAIRS,
            rounds=num_rounds,
            extension=is_built(),
        ),
        "feeds": timings_json(feeds),
        "lock": lock,
        "threads": threads,
        f"predicted_reads_per_s_of_{MANY_CORES}": predicted,
        "best_from_disk_pairs_per_s": best,
    }


def opened_stores(stack: ExitStack, path: Path) -> dict[str, TokenStore]:
    """Open the store in every way there is; each reader is made now."""
    ways = {IN_PYTHON: False} | ({DISK: True} if is_built() else {})
    stores = {HOST: stack.enter_context(TokenStore.open(path, access="resident"))}
    for name, unlocked in ways.items():
        with patch.object(reading, "is_built", lambda unlocked=unlocked: unlocked):
            stores[name] = stack.enter_context(TokenStore.open(path))
    return stores


def feeds_of(
    stack: ExitStack, stores: Mapping[str, TokenStore], picked: Int64
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield every store and batch size as something to run; its scores were checked."""
    device = stack.enter_context(closing(HostDevice()))
    for batch in BATCHES:
        for name, store in stores.items():
            engine = FreeEngine(manifest_for(batch))
            pipeline = stack.enter_context(closing(Pipeline(engine, store, device)))
            rows = store.live_rows()[picked]
            request = Request(one_query(), np.zeros(len(rows), np.int64), rows)
            _check(name, pipeline.run(request).scores, picked)
            yield f"{name}, batches of {batch:,}", partial(pipeline.run, request)


def _check(name: str, scores: Float32, picked: Int64) -> None:
    if not np.array_equal(scores, (picked % 1000).astype(np.float32)):
        raise EdjeError(f"{name}: what was fed is not what is stored")


def lock_of(store: TokenStore) -> dict[str, float]:
    """Return microseconds a record that one thread holds Python's lock, and that it does not.

    CPU time of the calls that let go of it, and of all around them: the least of many reads.
    """
    rows, (out, _) = store.live_rows(), store.layout.buffers(FEW)
    chance, inside, found = np.random.default_rng(3), [0.0], []
    store.read(rows[:FEW], out)
    with timed_calls(inside):
        for _ in range(NUM_LOCK_ROUNDS):
            some, inside[0] = chance.choice(rows, FEW), 0.0
            began = thread_time()
            store.read(some, out)
            found.append((thread_time() - began, inside[0]))
    least, without = min(found)
    return {
        "locked_us": round((least - without) / FEW * 1e6, 4),
        "unlocked_us": round(without / FEW * 1e6, 4),
    }


@contextmanager
def timed_calls(inside: list[float]) -> Iterator[None]:
    """Add up the CPU time of the calls that let go of the lock, both ways' own."""

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = thread_time()
            try:
                return call(*arguments)
            finally:
                inside[0] += thread_time() - began

        return run

    with (
        patch.object(reading, "read_and_hash", timed(read_and_hash)),
        patch.object(os, "preadv", timed(os.preadv)),
    ):
        yield


def most_reads(num_threads: int, *, locked_us: float, unlocked_us: float) -> float:
    """Return records/s of so many threads, the lock taken in turns and nothing else shared."""
    return min(num_threads / (locked_us + unlocked_us), 1 / locked_us) * 1e6


def reads_at_once(
    name: str, store: TokenStore, lock: Mapping[str, Mapping[str, float]]
) -> Iterator[dict[str, Any]]:
    """Yield records/s of 1, 2, 4 and more threads that each read batches of 64."""
    number = 1
    while number <= usable_cores():
        measured = max(_reads_per_s(store, number) for _ in range(NUM_ROUNDS))
        yield {
            "name": name,
            "threads": number,
            "reads_per_s": round(measured),
            "predicted": round(most_reads(number, **lock[name])),
        }
        number *= 2


def _reads_per_s(store: TokenStore, num_threads: int, each: int = 32) -> float:
    rows, ready = store.live_rows(), threading.Barrier(num_threads + 1)

    def work(seed: int) -> None:
        out, _ = store.layout.buffers(FEW)
        out[:] = 0
        some = np.random.default_rng(seed).choice(rows, (each, FEW))
        ready.wait()
        for one in some:
            store.read(one, out)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(num_threads)]
    for thread in threads:
        thread.start()
    ready.wait()
    began = perf_counter()
    for thread in threads:
        thread.join()
    return num_threads * each * FEW / (perf_counter() - began)


def summary(result: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    lines = [timings_table(result["feeds"]), ""]
    for name, each in result["lock"].items():
        whole = each["locked_us"] + each["unlocked_us"]
        lines.append(
            f"{name}: {whole:.2f} us a record by one thread, {each['locked_us']:.2f} of them "
            f"({each['locked_us'] / whole:.0%}) with Python's lock"
        )
    for row in result["threads"]:
        lines.append(
            f"{row['name']}, {row['threads']} at once: {row['reads_per_s']:,} records/s, "
            f"predicted {row['predicted']:,}"
        )
    for name, reads in result[f"predicted_reads_per_s_of_{MANY_CORES}"].items():
        lines.append(f"{name}, {MANY_CORES} cores (predicted, no limit but the lock): {reads:,}")
    return "\n".join([*lines, conditions_line(result["conditions"], "record")])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write `feed.json`."""
    parser = command_line("feed", __doc__)
    return run_rounds(parser, arguments, NUM_ROUNDS, measure, summary)


if __name__ == "__main__":
    sys.exit(main())
