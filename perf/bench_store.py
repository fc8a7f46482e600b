"""Reading the token store against plain copies, and opening one of a million ids.

    edje bench store

Random gathers of 256 of 20,480 full-size records (64 tokens x 384), page cache hot, all into one
buffer (page-aligned, as the pipeline's slots are), in turns: the store (verified, unverified, held
in memory), `np.load(mmap_mode="r")[rows]` of the same records, and a plain copy of the same bytes,
which lie together in memory for it. The records differ from turn to turn; everyone gets the same
sets, but never the one that another has just had and left in the CPU's cache. Every contestant's
output is compared with what was appended, before and after the turns.

What is expected is expected of float16. int8 records are half as long and their scales lie apart:
more system calls a byte, so that they are faster by the record and slower by the byte.

Random reads of 16 to 1,024 records, into memory from a page's start on and as `np.empty` gives it,
are compared with the loop that a user would write: `preadv` and xxh3, record by record.

Ids are resolved in a store of 1,000,000 ids, whose catalog alone is real, by a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import xxhash

from ..arrays import Array, Int64
from ..errors import EdjeError
from ..kernels.device.host import HostBuffer
from ..runtime.store import TokenStore
from ..runtime.store.format import ROW_BITS, ROW_MASK, SEGMENTS, segment_name
from .harness import (
    Progress,
    Timing,
    command_line,
    conditions,
    in_turn,
    interleave,
    run_benchmark,
    timings_json,
)
from .random_model import HIDDEN, NUM_TOKENS, image_id, write_store
from .wide_store import row_of, write_wide_store

NUM_RECORDS, GATHERED = 20_480, 256
NUM_SETS = 32  # of random records that the contestants are asked for, turn by turn
NUM_ROUNDS, NUM_DIRECT_ROUNDS = 160, 5
NUM_IDS, NUM_RESOLVED = 1_000_000, 50_000

COPY, MAPPED, TAKEN = "memcpy", "np.load mmap [rows]", "np.load mmap take"
VERIFIED, UNVERIFIED, RESIDENT, DIRECT = "verified", "unverified", "resident", "direct"
# How many times the speed of the second the first must have (float16).
EXPECTED = ((VERIFIED, COPY, 0.6), (UNVERIFIED, COPY, 0.8), (VERIFIED, MAPPED, 1.0))
# Of a plain loop's speed. The loop has its offsets at hand: finding and checking records costs some
# 10 us, however many they are, which 16 records do not make up for.
LEAST_OF_LOOP = {16: 1.0, 64: 1.0, 256: 1.0, 1024: 1.0}
MAX_RESOLVE_MS, MAX_OPEN_S, MAX_OPEN_MB = 25.0, 2.0, 60.0

Gathers = dict[str, Callable[[Int64], object]]


def measure(num_rounds: int, scratch: Path, progress: Progress) -> dict[str, Any]:
    """Measure both dtypes and the million ids; files go into `scratch`.

    Raises:
        EdjeError: a contestant's output is wrong.
    """
    gathers = {
        dtype: measure_gathers(scratch / dtype, dtype, num_rounds, progress)
        for dtype in ("float16", "int8")
    }
    progress(f"making a store of {NUM_IDS:,} ids")
    store = write_wide_store(scratch / "ids.store", NUM_IDS)
    result = {
        "conditions": conditions(
            records=NUM_RECORDS,
            gathered=GATHERED,
            shape=[NUM_TOKENS, HIDDEN],
            page_cache="hot",
            buffer="page-aligned",
        ),
        "gathers": gathers,
        "sizes": measure_sizes(scratch / "float16", num_rounds, progress),
        "ids": measure_ids(store, NUM_RESOLVED),
    }
    return {**result, "faults": list(faults_of(result))}


def measure_gathers(
    folder: Path, dtype: str, num_rounds: int, progress: Progress
) -> dict[str, Any]:
    """Let all contestants gather the same random records in turns; return speeds and ratios."""
    progress(f"writing {NUM_RECORDS:,} records of {dtype}")
    folder.mkdir(parents=True)
    tokens, scales = random_records(dtype, NUM_RECORDS)
    write_store(folder / "tokens.store", tokens, scales).close()
    np.save(folder / "tokens.npy", tokens)
    sets = random_sets(GATHERED)
    out = as_pinned(tokens[:GATHERED])
    out_scales = None if scales is None else np.zeros_like(scales[:GATHERED])
    mapped = np.load(folder / "tokens.npy", mmap_mode="r")
    together = {id(numbers): tokens[numbers] for numbers in sets}
    with ExitStack() as stack:
        cached, direct, resident = (
            stack.enter_context(TokenStore.open(folder / "tokens.store", access=access))
            for access in ("cached", "direct", "resident")
        )
        gathers: Gathers = {
            COPY: lambda numbers: np.copyto(out, together[id(numbers)]),
            MAPPED: lambda numbers: mapped[numbers],
            TAKEN: lambda numbers: np.take(mapped, numbers, axis=0, out=out, mode="clip"),
            VERIFIED: reading(cached, out, out_scales),
            UNVERIFIED: reading(cached, out, out_scales, verify=False),
            RESIDENT: reading(resident, out, out_scales),
        }
        progress("reading in turns")
        timings = timed(gathers, sets, out, tokens, num_rounds)
        waiting = {DIRECT: reading(direct, out, out_scales)}  # for the disk, in every round
        timings |= timed(waiting, sets, out, tokens, NUM_DIRECT_ROUNDS)
    least = {name: timing.min_ms for name, timing in timings.items()}
    compared = (*EXPECTED, (RESIDENT, COPY, 0), (UNVERIFIED, MAPPED, 0))
    return {
        "record_bytes": tokens[0].nbytes,
        "records": timings_json(timings),
        "gigabytes_per_s": {
            name: round(timing.pairs_per_s * tokens[0].nbytes / 1e9, 2)
            for name, timing in timings.items()
        },
        "ratios": {
            f"{fast} / {slow}": round(least[slow] / least[fast], 3) for fast, slow, _ in compared
        },
    }


def reading(
    store: TokenStore, out: Array, scales: Array | None = None, *, verify: bool = True
) -> Callable[[Int64], object]:
    """Return what reads the records of these numbers from the store into `out`."""
    rows = store.live_rows()
    return lambda numbers: store.read(rows[numbers], out, scales, verify=verify)


def timed(
    gathers: Gathers, sets: list[Int64], out: Array, tokens: Array, num_rounds: int
) -> dict[str, Timing]:
    """Time everyone in turns, each going through the sets; check what they gather before and after.

    Raises:
        EdjeError: an output differs from `tokens`.
    """
    step = len(sets) / len(gathers)  # never a set that the CPU's cache holds
    contestants = {
        name: in_turn(gather, sets, int(at * step))
        for at, (name, gather) in enumerate(gathers.items())
    }
    check(gathers, sets, out, tokens)
    timings = interleave(contestants, pairs=len(out), num_rounds=num_rounds)
    check(gathers, sets, out, tokens)
    return timings


def check(gathers: Gathers, sets: list[Int64], out: Array, tokens: Array) -> None:
    """Let everyone gather every set.

    Raises:
        EdjeError: an output differs from `tokens`.
    """
    bits = f"u{tokens.dtype.itemsize}"
    for name, gather in gathers.items():
        for at, numbers in enumerate(sets):
            out[:] = 0
            got = gather(numbers)
            found = got if isinstance(got, np.ndarray) else out
            if not np.array_equal(found.view(bits), tokens[numbers].view(bits)):
                raise EdjeError(f"{name}: set {at} differs from what was appended")


class PlainLoop:
    """Reads float16 records one by one, with no more than it takes to verify them."""

    def __init__(self, store: TokenStore):
        """Look everything up beforehand; the files stay open as long as the process runs."""
        rows = store.live_rows()
        folder, layout = store.path / SEGMENTS, store.layout
        files = {
            segment: os.open(folder / segment_name(segment), os.O_RDONLY)
            for segment in np.unique(rows >> ROW_BITS).tolist()
        }
        self._files = [files[segment] for segment in (rows >> ROW_BITS).tolist()]
        self._offsets = layout.offset(rows & ROW_MASK).tolist()
        self._seeds = [
            xxhash.xxh3_128_intdigest(name.encode()) & (2**64 - 1) for name in store.ids()
        ]
        self._sums, self._size = store.checksums(rows).tolist(), layout.record_bytes

    def read(self, numbers: Int64, out: Array) -> None:
        """Copy the records of these numbers into `out`.

        Raises:
            EdjeError: a record is not whole.
        """
        room, size = out.reshape(-1).view(np.uint8).data, self._size
        for at, number in enumerate(numbers.tolist()):
            view = room[at * size : (at + 1) * size]
            got = os.preadv(self._files[number], [view], self._offsets[number])
            digest = xxhash.xxh3_64_intdigest(view, self._seeds[number])
            if got != size or digest != self._sums[number]:
                raise EdjeError(f"record {number} is not whole")


def measure_sizes(folder: Path, num_rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """Let the store and a plain loop read the same random records; return one row a case."""
    found, tokens = [], np.load(folder / "tokens.npy", mmap_mode="r")
    with TokenStore.open(folder / "tokens.store") as store:
        loop = PlainLoop(store)
        for count in LEAST_OF_LOOP:
            sets, empty = random_sets(count), np.empty((count, *store.record_shape), np.float16)
            for name, out in (("aligned", as_pinned(empty)), ("np.empty", empty)):
                progress(f"reading {count} records into memory that is {name}")
                readers: Gathers = {
                    "store": reading(store, out),
                    "loop": partial(loop.read, out=out),
                }
                num_runs = max(num_rounds, num_rounds * 256 // count)
                timings = timed(readers, sets, out, tokens, num_runs)
                us = {who: timing.min_ms * 1e3 for who, timing in timings.items()}
                row = {"records": count, "buffer": name}
                row |= {f"{who}_us": round(least, 1) for who, least in us.items()}
                found.append({**row, "ratio": round(us["loop"] / us["store"], 3)})
    return found


def as_pinned(like: Array) -> Array:
    """Return zeros in memory as the pipeline's slots have it: from a page's start on."""
    return HostBuffer(like.size, like.dtype).view(like.shape)


def random_records(dtype: str, count: int) -> tuple[Array, Array | None]:
    """Return tokens [N, m, H] and scales [N, m] (None of float16), the same every time."""
    random, shape = np.random.default_rng(0), (count, NUM_TOKENS, HIDDEN)
    if dtype == "int8":
        scales = random.uniform(0.001, 0.01, shape[:2]).astype(np.float16)
        return random.integers(-127, 128, shape, np.int8), scales
    largest = int(np.float16(np.finfo(np.float16).max).view(np.uint16))
    return random.integers(0, largest, shape, np.uint16).view(np.float16), None


def random_sets(count: int) -> list[Int64]:
    """Return sets of `count` numbers of records, the same every time."""
    random = np.random.default_rng(1)
    return [random.integers(0, NUM_RECORDS, count) for _ in range(NUM_SETS)]


def measure_ids(store: Path, num_resolved: int) -> dict[str, float]:
    """Open the store in a new process and resolve random ids; return times and memory.

    Raises:
        EdjeError: that process fails.
    """
    command = [sys.executable, "-m", __spec__.name, "--resolve", str(store), str(num_resolved)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise EdjeError(f"the process that resolves ids failed: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def resolve(path: Path, num_resolved: int) -> dict[str, float]:
    """Open the store, resolve random ids a few times; what `measure_ids` runs.

    Raises:
        EdjeError: an id has the wrong row.
    """
    before, began = _memory_mb("VmRSS"), perf_counter()
    with TokenStore.open(path) as store:
        open_s, after = perf_counter() - began, _memory_mb("VmRSS")
        peak = _memory_mb("VmHWM")
        numbers = np.random.default_rng(2).integers(0, len(store), num_resolved)
        ids = [image_id(number) for number in numbers.tolist()]
        times = []
        for _ in range(20):
            began = perf_counter()
            rows = store.rows(ids)
            times.append((perf_counter() - began) * 1e3)
        expected, num_ids = row_of(numbers, 0, store.layout), len(store)
    if not np.array_equal(rows, expected):
        raise EdjeError("ids have wrong rows")
    return {
        "num_ids": num_ids,
        "num_resolved": num_resolved,
        "open_s": round(open_s, 3),
        "open_mb": round(after - before, 1),
        "open_peak_mb": round(peak - before, 1),
        "resolve_ms": round(min(times), 2),
        "first_resolve_ms": round(times[0], 2),
    }


def _memory_mb(name: str) -> float:
    """Return a figure of /proc/self/status in MB."""
    for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1e3
    raise EdjeError(f"/proc/self/status tells no {name}")


def faults_of(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence for everything that is slower or larger than expected."""
    found = result["gathers"]["float16"]["ratios"]
    for fast, slow, least in EXPECTED:
        got = found[f"{fast} / {slow}"]
        if got < least:
            yield f"float16: {fast} has {got} times the speed of {slow}, expected {least}"
    for row in result["sizes"]:
        least = LEAST_OF_LOOP[row["records"]]
        if row["ratio"] < least:
            yield (
                f"{row['records']} records, {row['buffer']}: the store has {row['ratio']} times "
                f"the speed of a plain loop, expected {least}"
            )
    limits = {"resolve_ms": MAX_RESOLVE_MS, "open_s": MAX_OPEN_S, "open_mb": MAX_OPEN_MB}
    for name, most in limits.items():
        if result["ids"][name] > most:
            yield f"ids: {name} is {result['ids'][name]}, expected at most {most}"


def summary(result: Mapping[str, Any]) -> str:
    """Return the figures as aligned lines of text."""
    lines = [f"{'':28}  {'min us':>8}  {'median us':>9}  {'GB/s':>6}  {'of memcpy':>9}"]
    for dtype, found in result["gathers"].items():
        least = {timing["name"]: timing["min_ms"] for timing in found["records"]}
        lines += [
            f"{dtype + ' ' + timing['name']:28}  {timing['min_ms'] * 1e3:8.0f}"
            f"  {timing['median_ms'] * 1e3:9.0f}  {found['gigabytes_per_s'][timing['name']]:6.1f}"
            f"  {least[COPY] / timing['min_ms']:9.2f}"
            for timing in found["records"]
        ]
    lines += [
        f"{row['records']:>5} records, {row['buffer']:8}  store {row['store_us']:8.0f} us"
        f"  plain loop {row['loop_us']:8.0f} us  ratio {row['ratio']:.2f}"
        for row in result["sizes"]
    ]
    lines += [f"{name:20}  {value:>12,}" for name, value in result["ids"].items()]
    return "\n".join([*lines, *(f"NOT REACHED: {fault}" for fault in result["faults"])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write `store.json`; return 1 where a figure falls short."""
    parser = command_line("store", __doc__)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--resolve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.resolve:
        print(json.dumps(resolve(Path(options.resolve[0]), int(options.resolve[1]))))
        return 0
    return run_benchmark(options, lambda *given: measure(options.rounds, *given), summary)


if __name__ == "__main__":
    sys.exit(main())
