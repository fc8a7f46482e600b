"""Which scores a service gives, and for which ids: what a router must know of a shard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

from ...arrays import UInt64

STATE_HEADER = "x-edje-state"  # of a scored answer: the tag of what scored it
SCORER_HEADER = "x-edje-scorer"  # of the digests: the fingerprint in full
MEDIA_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Identity:
    """What two services have in common whose answers may stand in for each other.

    Attributes:
        scorer: fingerprint of the model: raw scores of one scorer compare.
        digests: uint64 [N], ascending: of the ids, as `TokenStore.digests` has them.
        tag: `SCORER-IDS`, hashes of both; no quotes, fit for a header.
    """

    scorer: str
    digests: UInt64
    tag: str

    @classmethod
    def of(cls, scorer: str, digests: UInt64) -> Identity:
        """Return the identity of a scorer over ids."""
        name = xxhash.xxh3_64_hexdigest(scorer.encode())
        return cls(scorer, digests, f"{name}-{xxhash.xxh3_64_hexdigest(little(digests).data)}")

    def to_bytes(self) -> bytes:
        """Return the digests as they travel: little-endian, 8 bytes each."""
        return little(self.digests).tobytes()


def little(digests: UInt64) -> UInt64:
    """Return digests as they travel and are hashed."""
    return np.ascontiguousarray(digests, "<u8")


def scorer_of(tag: str) -> str:
    """Return the half of a tag that names the scorer."""
    return tag.partition("-")[0]
