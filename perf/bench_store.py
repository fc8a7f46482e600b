"""Reading the token store against plain copies, and opening one of a million ids.

    python -m edje.perf.bench_store

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
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

import numpy as np

from ..arrays import Array, Int64
from ..errors import EdjeError
from ..runtime.store import TokenStore
from ..runtime.store.catalog import Catalog, Change, Segment
from ..runtime.store.format import ROW_BITS
from ..runtime.store.records import RecordBatch, Records, digests_of
from .harness import (
    ROOT,
    Timing,
    add_out_option,
    conditions,
    interleave,
    timings_json,
    write_result,
)
from .plain_loop import as_pinned, in_turn, measure_sizes

NUM_TOKENS, HIDDEN = 64, 384
NUM_RECORDS, GATHERED = 20_480, 256
APPENDED_AT_ONCE = 1024
NUM_SETS = 32  # of random records that the contestants are asked for, turn by turn
NUM_ROUNDS, NUM_DIRECT_ROUNDS = 160, 5
NUM_IDS, NUM_RESOLVED = 1_000_000, 50_000
FIRST_SEGMENT = 1

COPY, MAPPED, TAKEN = "memcpy", "np.load mmap [rows]", "np.load mmap take"
VERIFIED, UNVERIFIED, RESIDENT, DIRECT = "verified", "unverified", "resident", "direct"
# How many times the speed of the second the first must have (float16).
EXPECTED = ((VERIFIED, COPY, 0.6), (UNVERIFIED, COPY, 0.8), (VERIFIED, MAPPED, 1.0))
# Of a plain loop's speed. The loop has its offsets at hand: finding and checking records costs some
# 10 us, however many they are, which 16 records do not make up for.
LEAST_OF_LOOP = {16: 1.0, 64: 1.0, 256: 1.0, 1024: 1.0}
MAX_RESOLVE_MS, MAX_OPEN_S, MAX_OPEN_MB = 25.0, 2.0, 60.0

Dtype = Literal["float16", "int8"]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Content:
    """What a store was given: tokens [N, m, H], scales [N, m] (int8), and the ids."""

    ids: list[str]
    tokens: Array
    scales: Array | None


def run_benchmark(num_rounds: int, scratch: Path, tell: Tell) -> dict[str, Any]:
    """Measure both dtypes and the million ids; files go into `scratch`.

    Raises:
        EdjeError: a contestant's output is wrong.
    """
    dtypes: tuple[Dtype, ...] = ("float16", "int8")
    gathers = {dtype: measure_gathers(scratch / dtype, dtype, num_rounds, tell) for dtype in dtypes}
    tell(f"making a catalog of {NUM_IDS:,} ids")
    store = write_catalog(scratch / "ids.store", NUM_IDS)
    result = {
        "conditions": conditions(
            records=NUM_RECORDS,
            gathered=GATHERED,
            shape=[NUM_TOKENS, HIDDEN],
            page_cache="hot",
            buffer="page-aligned",
        ),
        "gathers": gathers,
        "sizes": measure_sizes(
            scratch / "float16" / "tokens.store", tuple(LEAST_OF_LOOP), num_rounds, tell
        ),
        "ids": measure_ids(store, NUM_RESOLVED),
    }
    return {**result, "faults": list(faults_of(result))}


def measure_gathers(folder: Path, dtype: Dtype, num_rounds: int, tell: Tell) -> dict[str, Any]:
    """Let all contestants gather the same random records in turns; return speeds and ratios."""
    tell(f"writing {NUM_RECORDS:,} records of {dtype}")
    folder.mkdir(parents=True)
    content = make_content(dtype, NUM_RECORDS)
    write_store(folder / "tokens.store", content)
    np.save(folder / "tokens.npy", content.tokens)
    random = np.random.default_rng(1)
    asked = [random.integers(0, NUM_RECORDS, GATHERED) for _ in range(NUM_SETS)]
    with ExitStack() as stack:
        stores = {
            access: stack.enter_context(TokenStore.open(folder / "tokens.store", access=access))
            for access in ("cached", "direct", "resident")
        }
        turns = Turns(content, asked, stores, folder / "tokens.npy")
        turns.check()
        tell("reading in turns")
        contestants = turns.contestants()
        direct = {DIRECT: contestants.pop(DIRECT)}  # would wait for the disk in every round
        timings = interleave(contestants, pairs=GATHERED, num_rounds=num_rounds)
        timings |= interleave(direct, pairs=GATHERED, num_rounds=NUM_DIRECT_ROUNDS)
        turns.check()
    return {
        "record_bytes": content.tokens[0].nbytes,
        "records": timings_json(timings),
        "gigabytes_per_s": {
            name: round(timing.pairs_per_s * content.tokens[0].nbytes / 1e9, 2)
            for name, timing in timings.items()
        },
        "ratios": ratios(timings),
    }


class Turns:
    """Contestants that gather the same sets of records into one buffer."""

    def __init__(
        self, content: Content, asked: list[Int64], stores: Mapping[str, TokenStore], npy: Path
    ):
        self._content, self._asked = content, asked
        self._out = as_pinned(content.tokens[:GATHERED])
        self._scales = None if content.scales is None else np.zeros_like(content.scales[:GATHERED])
        mapped, out = np.load(npy, mmap_mode="r"), self._out
        sources = {id(places): content.tokens[places] for places in asked}
        self._gathers: dict[str, Callable[[Int64], object]] = {
            COPY: lambda places: np.copyto(out, sources[id(places)]),
            MAPPED: lambda places: mapped[places],
            TAKEN: lambda places: np.take(mapped, places, axis=0, out=out, mode="clip"),
            VERIFIED: self._reading(stores["cached"], verify=True),
            UNVERIFIED: self._reading(stores["cached"], verify=False),
            RESIDENT: self._reading(stores["resident"], verify=True),
            DIRECT: self._reading(stores["direct"], verify=True),
        }

    def contestants(self) -> dict[str, Callable[[], object]]:
        """Return name -> one gather; each goes through the sets one after the other."""
        gathers = self._gathers.items()
        step = len(self._asked) / len(self._gathers)  # never a set that the CPU's cache holds
        return {
            name: in_turn(gather, self._asked, int(at * step))
            for at, (name, gather) in enumerate(gathers)
        }

    def check(self) -> None:
        """Let everyone gather every set.

        Raises:
            EdjeError: an output differs from what was appended.
        """
        for name, gather in self._gathers.items():
            for at, places in enumerate(self._asked):
                self._out[:] = 0
                got = gather(places)
                found = got if isinstance(got, np.ndarray) else self._out
                if not np.array_equal(_bits(found), _bits(self._content.tokens[places])):
                    raise EdjeError(f"{name}: set {at} differs from what was appended")

    def _reading(self, store: TokenStore, *, verify: bool) -> Callable[[Int64], object]:
        rows = store.rows(self._content.ids)
        return lambda places: store.read(rows[places], self._out, self._scales, verify=verify)


def make_content(dtype: Dtype, count: int) -> Content:
    """Return random records, the same every time."""
    random = np.random.default_rng(0)
    ids, shape = [f"images/{number:07d}.jpg" for number in range(count)], (NUM_TOKENS, HIDDEN)
    if dtype == "int8":
        tokens = random.integers(-127, 128, (count, *shape), np.int8)
        scales = random.uniform(0.001, 0.01, (count, NUM_TOKENS)).astype(np.float16)
        return Content(ids, tokens, scales)
    largest = int(np.float16(np.finfo(np.float16).max).view(np.uint16))
    tokens = random.integers(0, largest, (count, *shape), np.uint16).view(np.float16)
    return Content(ids, tokens, None)


def write_store(path: Path, content: Content) -> None:
    """Write the records by the public API."""
    with create_store(path, str(content.tokens.dtype)) as store:
        for start in range(0, len(content.ids), APPENDED_AT_ONCE):
            part = slice(start, start + APPENDED_AT_ONCE)
            scales = None if content.scales is None else content.scales[part]
            store.append(content.ids[part], content.tokens[part], scales)


def create_store(path: Path, dtype: str) -> TokenStore:
    """Make an empty store of full-size records."""
    return TokenStore.create(
        path, num_tokens=NUM_TOKENS, hidden=HIDDEN, fingerprint_encoder="bench", dtype=dtype
    )


def write_catalog(path: Path, num_ids: int) -> Path:
    """Write a store of full segments of full-size records, of which only the catalog exists."""
    with create_store(path, "float16") as store:
        max_rows = store.layout.max_rows
    catalog = Catalog.open(path, writable=True)
    try:
        for segment, first in enumerate(range(0, num_ids, max_rows), FIRST_SEGMENT):
            numbers = range(first, min(first + max_rows, num_ids))
            batches = [
                RecordBatch(segment, at, _records(numbers[at : at + APPENDED_AT_ONCE]))
                for at in range(0, len(numbers), APPENDED_AT_ONCE)
            ]
            info = Segment(num_rows=len(numbers), sealed=True, key=segment)
            catalog.commit(Change(added=batches, segments={segment: info}))
    finally:
        catalog.close()
    return path


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
        ids = [_id(number) for number in numbers.tolist()]
        times = []
        for _ in range(20):
            began = perf_counter()
            rows = store.rows(ids)
            times.append((perf_counter() - began) * 1e3)
        max_rows, num_ids = store.layout.max_rows, len(store)
    segments = FIRST_SEGMENT + numbers // max_rows
    if not np.array_equal(rows, segments << ROW_BITS | numbers % max_rows):
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


def ratios(timings: Mapping[str, Timing]) -> dict[str, float]:
    """Return how many times the speed of the second each expected contestant has (minima)."""
    return {
        f"{fast} / {slow}": round(timings[slow].min_ms / timings[fast].min_ms, 3)
        for fast, slow, _ in (*EXPECTED, (RESIDENT, COPY, 0), (UNVERIFIED, MAPPED, 0))
    }


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


def _records(numbers: range) -> Records:
    ids = [_id(number) for number in numbers]
    return Records.pack(ids, digests_of(ids), np.array(numbers, np.uint64))


def _id(number: int) -> str:
    return f"images/{number // 1000:04d}/{number:07d}.jpg"


def _bits(array: Array) -> Array:
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _memory_mb(name: str) -> float:
    """Return a figure of /proc/self/status in MB."""
    for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1e3
    raise EdjeError(f"/proc/self/status tells no {name}")


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write `store.json`; return 1 where a figure falls short."""
    parser = argparse.ArgumentParser(prog="python -m edje.perf.bench_store", description=__doc__)
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--name", default="store", help="of the JSON file")
    parser.add_argument("--resolve", nargs=2, help=argparse.SUPPRESS)
    add_out_option(parser)
    options = parser.parse_args(arguments)
    try:
        if options.resolve:
            print(json.dumps(resolve(Path(options.resolve[0]), int(options.resolve[1]))))
            return 0
        cache = ROOT / ".cache"
        cache.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=cache) as scratch:
            result = run_benchmark(
                options.rounds, Path(scratch), lambda line: print(f"... {line}", flush=True)
            )
    except EdjeError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(result))
    print(f"written to {write_result(options.name, result, options.out)}")
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
