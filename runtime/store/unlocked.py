"""Read many records and hash each in one call, without the GIL: a C extension, where it was built.

    read_and_hash(table, count, size, hashed)

reads `size` bytes (241 or more) of each of `count` places in files, and returns how many came whole
before the first that did not. `table`: address of an int64 [5, count], C-contiguous, the caller's:
file descriptors, offsets in the files, addresses to read to, seeds (uint64), and XXH3-64 hashes
(uint64), which are written where `hashed`.

A record of 48 KiB hashes in less time than a thread takes to get the GIL, and `xxhash` keeps it for
up to 64 KiB: in Python, threads that read would spend their time waiting for one another.
"""

from __future__ import annotations

import os
from functools import cache
from tempfile import TemporaryFile

import numpy as np
import xxhash

from ...arrays import Array

try:
    from ._unlocked import read_and_hash as read_and_hash
except ImportError:  # no compiler built it
    read_and_hash = None  # type: ignore[assignment]

LEAST_BYTES = 241  # XXH3 hashes shorter input in other ways
SWITCH = "EDJE_UNLOCKED_READ"  # 0: read in Python
CHECKED = (LEAST_BYTES, 1024, 1025, 49_152)  # bytes


@cache
def is_built() -> bool:
    """Whether records can be read so: built, not switched off, and hashing as `xxhash` does."""
    if read_and_hash is None or os.environ.get(SWITCH) == "0":
        return False
    return all(map(_is_right, CHECKED))


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


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])
