"""Read many records and hash each in one call, without the GIL: a C extension, where it was built.

A record of 48 KiB hashes in less time than a thread takes to get the GIL, and `xxhash` keeps it for
up to 64 KiB: in Python, threads that read would spend their time waiting for one another.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from tempfile import TemporaryFile

import numpy as np
import xxhash

from ...arrays import Int64, UInt64
from .scattered import address

try:
    from . import _unlocked
except ImportError:  # no compiler built it
    _unlocked = None

LEAST_BYTES = 241  # XXH3 hashes shorter input in other ways
SWITCH = "EDJE_UNLOCKED_READ"  # 0: read in Python
CHECKED = (LEAST_BYTES, 1024, 1025, 49_152)  # bytes


@cache
def is_built() -> bool:
    """Whether records can be read so: built, not switched off, and hashing as `xxhash` does."""
    return _unlocked is not None and os.environ.get(SWITCH) != "0" and all(map(_is_right, CHECKED))


def read_hashed(
    files: Sequence[int] | int,
    addresses: Int64,
    num_bytes: int,
    offsets: Int64,
    seeds: UInt64 | None,
) -> UInt64 | None:
    """Read `num_bytes` (241 or more) of each of `files` [N] from `offsets` [N] to memory.

    Args:
        files: descriptors, which stay open meanwhile; or one, for all.
        addresses: int64 [N], where to; the memory stays the caller's, who keeps it alive.
        seeds: of the hashes; None: nothing is hashed.

    Returns:
        XXH3-64 of each, uint64 [N], anything where nothing was to be hashed; None where not all
        came whole: read one by one, to learn why.
    """
    count = len(offsets)
    table = np.empty((5, count), np.int64)
    table[0], table[1], table[2] = files, offsets, addresses
    if seeds is not None:
        table[3] = seeds.view(np.int64)
    if _unlocked.read_and_hash(address(table), count, num_bytes, seeds is not None) < count:
        return None
    return table[4].view(np.uint64)


def _is_right(num_bytes: int) -> bool:
    """Whether a record of this size is read and hashed as `xxhash` hashes it."""
    content = bytes(at * 7 % 251 for at in range(num_bytes))
    seeds, room = np.array([0, 1 << 63 | 12345], np.uint64), np.zeros((2, num_bytes), np.uint8)
    places = address(room) + np.arange(2) * num_bytes
    with TemporaryFile() as file:
        file.write(content)
        file.flush()
        sums = read_hashed(file.fileno(), places, num_bytes, np.zeros(2, np.int64), seeds)
    expected = [xxhash.xxh3_64_intdigest(content, seed) for seed in seeds.tolist()]
    return sums is not None and sums.tolist() == expected and room[1].tobytes() == content
