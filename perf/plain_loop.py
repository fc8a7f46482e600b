"""The loop that a user would write to read records (`preadv`, xxh3), against the store's reader."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ..arrays import Array, Int64
from ..errors import EdjeError
from ..kernels.device.host import HostBuffer
from ..runtime.store import TokenStore
from ..runtime.store.format import ROW_BITS, ROW_MASK, SEGMENTS, segment_name
from .harness import interleave

NUM_SETS = 32  # of random records, turn by turn


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


def measure_sizes(
    path: Path, sizes: Sequence[int], num_rounds: int, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Let the store and a plain loop read the same random records; return one row a case.

    Raises:
        EdjeError: what they read differs.
    """
    found = []
    with TokenStore.open(path) as store:
        loop, rows, random = PlainLoop(store), store.live_rows(), np.random.default_rng(3)
        for count in sizes:
            sets = [random.integers(0, len(rows), count) for _ in range(NUM_SETS)]
            empty = np.empty((count, *store.record_shape), np.float16)
            for name, out in (("aligned", as_pinned(empty)), ("np.empty", empty)):
                tell(f"reading {count} records into memory that is {name}")
                _check_equal(store, loop, rows, sets[0], out)
                contestants = {
                    "store": in_turn(_reading(store, rows, out), sets, 0),
                    "loop": in_turn(partial(loop.read, out=out), sets, NUM_SETS // 2),
                }
                num_runs = max(num_rounds, num_rounds * 256 // count)
                least = interleave(contestants, pairs=count, num_rounds=num_runs)
                found.append(
                    {
                        "records": count,
                        "buffer": name,
                        **{f"{who}_us": round(least[who].min_ms * 1e3, 1) for who in least},
                        "ratio": round(least["loop"].min_ms / least["store"].min_ms, 3),
                    }
                )
    return found


def _reading(store: TokenStore, rows: Int64, out: Array) -> Callable[[Int64], object]:
    return lambda numbers: store.read(rows[numbers], out)


def _check_equal(
    store: TokenStore, loop: PlainLoop, rows: Int64, numbers: Int64, out: Array
) -> None:
    store.read(rows[numbers], out)
    expected = out.copy()
    out[:] = 0
    loop.read(numbers, out)
    if not np.array_equal(out.view(np.uint16), expected.view(np.uint16)):
        raise EdjeError("the store and the plain loop read different records")


def in_turn(
    gather: Callable[[Int64], object], sets: Sequence[Int64], first: int
) -> Callable[[], object]:
    """Gather one set after the other, beginning with `first`."""
    turns = cycle([*sets[first:], *sets[:first]])
    return lambda: gather(next(turns))


def as_pinned(like: Array) -> Array:
    """Return zeros in memory as the pipeline's slots have it: from a page's start on."""
    return HostBuffer(like.size, like.dtype).view(like.shape)
