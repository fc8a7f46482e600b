"""Token stores of other libraries beside ours: the records of some ids, into the caller's memory.

Page cache hot, random records, everybody into the same page-aligned buffer and compared with the
tokens before the turns. Ours verifies a checksum of every record; the others return a flipped bit
as data, and are slower or faster with that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ...arrays import Array, Float16, Int64
from ...errors import EdjeError
from ...kernels.device.host import HostBuffer
from ...runtime.store import TokenStore
from ..harness import in_turn, take_turns
from ..report import Measured
from .contest import Bench

GROUP = "peers-stores"
GATHERED, NUM_SETS = 256, 16  # records a turn, and different sets of them
Read = Callable[[Int64], object]  # of the records of these numbers


def measure_stores(
    bench: Bench, tokens: Float16, num_rounds: int
) -> tuple[list[Measured], dict[str, str]]:
    """Let everybody read random records in turns; return what it took, and who was skipped.

    Args:
        tokens: of the bench's ids, float16 [N, m, H].

    Raises:
        EdjeError: somebody's records differ from `tokens`.
    """
    ids, stack = bench.ids, bench.stack
    bench.progress("writing the tokens as other libraries keep them")
    count = min(GATHERED, len(tokens))
    out = HostBuffer(tokens[:count].size, tokens.dtype).view(tokens[:count].shape)
    random = np.random.default_rng(0)
    sets = [random.choice(len(tokens), count, replace=False) for _ in range(NUM_SETS)]
    makers: dict[str, Callable[[], Read]] = {
        "token-store": lambda: our_store(bench.store, ids, out, stack, verify=True),
        "token-store-unverified": lambda: our_store(bench.store, ids, out, stack, verify=False),
        "numpy-map": lambda: numpy_map(ids, tokens, out, bench.scratch),
        "lmdb": lambda: lmdb_store(ids, tokens, out, bench.scratch, stack),
        "safetensors": lambda: safetensors_slices(ids, tokens, out, bench.scratch, stack),
    }
    readers, skipped = {}, {}
    for name, make in makers.items():
        try:
            readers[name] = make()
        except ImportError as error:
            skipped[name] = f"{error}: pip install -e '.[perf]' -c constraints.txt"
            continue
        for numbers in sets[:2]:
            out[:] = 0
            readers[name](numbers)
            if not np.array_equal(out.view(np.uint16), tokens[numbers].view(np.uint16)):
                raise EdjeError(f"{name}: the records differ from what was written")
    step = len(sets) / len(readers)  # never the set that another has just left in the cache
    turns = {
        name: in_turn(read, sets, int(at * step)) for at, (name, read) in enumerate(readers.items())
    }
    bench.progress(f"reading {count} records in turns")
    return [
        Measured(
            name,
            GROUP,
            [ms / 1e3 for ms in took.wall_ms],
            pairs=count,
            params={"records": count},
            cpu_seconds=[ms / 1e3 for ms in took.cpu_ms],
            conditions={
                "gigabytes_per_s": round(out.nbytes / min(took.wall_ms) / 1e6, 3),
                "verified": name == "token-store",
                "page_cache": "hot",
            },
        )
        for name, took in take_turns(turns, num_rounds).items()
    ], skipped


def our_store(
    path: Path, ids: Sequence[str], out: Array, stack: ExitStack, *, verify: bool
) -> Read:
    """Open our store."""
    store = stack.enter_context(TokenStore.open(path))
    return lambda numbers: store.read(
        store.rows([ids[number] for number in numbers.tolist()]), out, verify=verify
    )


def numpy_map(ids: Sequence[str], tokens: Float16, out: Array, scratch: Path) -> Read:
    """Write one array, map it; a dictionary knows the rows.

    `mode="clip"` lets numpy write into `out` itself: twice as fast as without.
    """
    np.save(scratch / "tokens.npy", tokens)
    mapped = np.load(scratch / "tokens.npy", mmap_mode="r")
    rows = {name: row for row, name in enumerate(ids)}

    def read(numbers: Int64) -> None:
        found = [rows[ids[number]] for number in numbers.tolist()]
        np.take(mapped, found, axis=0, out=out, mode="clip")

    return read


def lmdb_store(
    ids: Sequence[str], tokens: Float16, out: Array, scratch: Path, stack: ExitStack
) -> Read:
    """Write a value for each id; read without copies of its own (`buffers=True`)."""
    import lmdb

    environment = lmdb.open(str(scratch / "tokens.lmdb"), map_size=4 * tokens.nbytes + (64 << 20))
    stack.callback(environment.close)
    with environment.begin(write=True) as writing:
        for name, record in zip(ids, tokens, strict=True):
            writing.put(name.encode(), record.tobytes())
    keys = [name.encode() for name in ids]
    flat = out.reshape(len(out), -1)

    def read(numbers: Int64) -> None:
        with environment.begin(buffers=True) as reading:
            for at, number in enumerate(numbers.tolist()):
                record: Any = reading.get(keys[number])
                flat[at] = np.frombuffer(record, np.float16)

    return read


def safetensors_slices(
    ids: Sequence[str], tokens: Float16, out: Array, scratch: Path, stack: ExitStack
) -> Read:
    """Write one tensor; take a slice of it for each record."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = scratch / "tokens.safetensors"
    save_file({"tokens": tokens}, path)
    whole = stack.enter_context(safe_open(path, framework="numpy")).get_slice("tokens")
    rows = {name: row for row, name in enumerate(ids)}

    def read(numbers: Int64) -> None:
        for at, number in enumerate(numbers.tolist()):
            row = rows[ids[number]]
            out[at] = whole[row : row + 1][0]

    return read
