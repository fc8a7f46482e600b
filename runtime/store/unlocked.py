"""A store's inner loops in C, where they were built.

    read_and_hash(table, count, size, hashed)

reads `size` bytes (241 or more) of each of `count` places in files, and returns how many came whole
before the first that did not. `table`: address of an int64 [5, count], C-contiguous, the caller's:
file descriptors, offsets in the files, addresses to read to, seeds (uint64), and XXH3-64 hashes
(uint64), which are written where `hashed`.

A record of 48 KiB hashes in less time than a thread takes to get the GIL, and `xxhash` keeps it for
up to 64 KiB: in Python, threads that read would spend their time waiting for one another.

    find_ids(ids, table)

looks a list of ids up by their digests, with the GIL, and returns the bytes of int64 [N] places, -1
for what is not there, and how many are there. `table`: see `table_of`. It raises TypeError where an
id is no string.
"""

from __future__ import annotations

import os
from functools import cache
from tempfile import TemporaryFile

import numpy as np
import xxhash

from ...arrays import Array, Bool, UInt64

try:
    from ._unlocked import find_ids as find_ids
    from ._unlocked import read_and_hash as read_and_hash
except ImportError:  # no compiler built it
    find_ids = read_and_hash = None  # type: ignore[assignment]

LEAST_BYTES = 241  # XXH3 hashes shorter input in other ways
SWITCH = "EDJE_UNLOCKED_READ"  # 0: Python reads, and looks ids up
MOST = 2**64 - 1
CHECKED = (LEAST_BYTES, 1024, 1025, 49_152)  # bytes
CHECKED_IDS = (1, 3, 4, 8, 9, 16, 17, 32, 33, 64, 96, 97, 128, 129, 160, 240, 241, 2000)  # bytes


@cache
def is_built() -> bool:
    """Whether all this can be used: built, not switched off, and hashing as `xxhash` does."""
    if read_and_hash is None or os.environ.get(SWITCH) == "0":
        return False
    return all(map(_is_right, CHECKED)) and _finds_all()


def table_of(
    buckets: Array, keys: UInt64, order: Array, highs: UInt64, live: Bool, shift: int
) -> bytes:
    """Return what `find_ids` takes for a table; the arrays must stay where they are.

    Args:
        buckets: uint32 or int64 [2 ** (64 - shift) + 1], by the leading bits of a key: where the
            first one that is not smaller stands in `keys`.
        keys: uint64 [K + 1], ascending: low halves of digests, and one larger than any.
        order: [K], of the dtype of `buckets`: places of their records.
        highs: uint64 [P]: by place, the high half of a record's digest.
        live: bool [P]: by place, whether the record counts.
        shift: see `buckets`.
    """
    addresses = [_address(each) for each in (buckets, keys, order, highs, live)]
    numbers = [*addresses, len(order), shift, buckets.itemsize]
    return np.array(numbers, np.uint64).tobytes()


def _is_right(num_bytes: int) -> bool:
    """Whether a record of this size is read and hashed as `xxhash` hashes it."""
    content, seed = bytes(at * 7 % 251 for at in range(num_bytes)), 1 << 63 | 12345
    room, table = np.zeros(num_bytes, np.uint8), np.zeros((5, 1), np.int64)
    with TemporaryFile() as file:
        file.write(content)
        file.flush()
        table[0], table[2] = file.fileno(), _address(room)
        table.view(np.uint64)[3] = seed
        num_read: int = read_and_hash(_address(table), 1, num_bytes, True)
    hashed = table.view(np.uint64).item(4)
    expected = xxhash.xxh3_64_intdigest(content, seed)
    return num_read == 1 and room.tobytes() == content and hashed == expected


def _finds_all() -> bool:
    """Whether ids of each size are found among themselves, and another one is not."""
    ids = ["e" * size for size in CHECKED_IDS]
    hashed = [xxhash.xxh3_128_intdigest(each.encode()) for each in ids]
    digests = sorted(hashed, key=lambda digest: digest & MOST)
    keys = np.array([*(digest & MOST for digest in digests), MOST], np.uint64)
    highs = np.array([digest >> 64 for digest in digests], np.uint64)
    order = np.arange(len(ids))
    buckets = np.searchsorted(keys, np.array([0, 1 << 63, MOST], np.uint64))
    table = table_of(buckets, keys, order, highs, np.ones(len(ids), np.bool_), 63)
    expected = list(map(digests.index, hashed))
    places, num_found = find_ids([*ids, "f"], table)
    found: list[int] = np.frombuffer(places, np.int64).tolist()
    return found == [*expected, -1] and num_found == len(ids)


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])
