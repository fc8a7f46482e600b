"""Which shard holds an id: the digests of all shards' ids in one sorted table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ....arrays import UInt64

Places = npt.NDArray[np.int16]

NOWHERE = -1


class Table:
    """Ids -> shards. 11 bytes an id; never changed once it is made.

    Attributes:
        num_ids: each once.
        num_doubles: ids that a further shard holds, too; the first one of them is asked.
    """

    def __init__(self, parts: Sequence[UInt64 | None]):
        """`parts`: uint64 [N], ascending: the digests of each shard's ids; None: not known yet."""
        known = [(part, place) for place, part in enumerate(parts) if part is not None]
        digests = np.concatenate([np.empty(0, np.uint64), *(part for part, _ in known)])
        places = np.concatenate(
            [np.empty(0, np.int16), *(np.full(len(part), at, np.int16) for part, at in known)]
        )
        order = np.argsort(digests, kind="stable")
        digests, places = digests[order], places[order]
        is_first = np.ones(len(digests), np.bool_)
        is_first[1:] = digests[1:] != digests[:-1]
        self.num_ids = int(np.count_nonzero(is_first))
        self.num_doubles = len(digests) - self.num_ids
        bits = max(1, min(28, self.num_ids.bit_length() - 1))
        self._shift = np.uint64(64 - bits)
        # One more, larger than any: where a search that finds nothing ends.
        self._digests = np.append(digests[is_first], np.uint64(2**64 - 1))
        self._places = np.append(places[is_first], np.int16(NOWHERE))
        leading = np.arange(1 << bits, dtype=np.uint64) << self._shift
        self._buckets = np.searchsorted(self._digests[:-1], leading)

    def find(self, digests: npt.NDArray[Any]) -> Places:
        """Return int16 [N]: the shards that hold ids of these digests, uint64 [N]; -1 for none."""
        wanted = digests.astype(np.uint64)
        at = self._buckets[wanted >> self._shift]
        found = self._digests[at]
        behind = np.flatnonzero(found < wanted)
        while len(behind):
            at[behind] += 1
            behind = behind[self._digests[at[behind]] < wanted[behind]]
        places: Places = np.where(self._digests[at] == wanted, self._places[at], NOWHERE)
        return places.astype(np.int16)
