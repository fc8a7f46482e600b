"""What the store knows of some records: ids, digests of the ids, checksums of the bytes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import StoreError
from .layout import MAX_ID_BYTES, UInt64, id_digest

DIGEST_BYTES = 16
CHECKSUM_BYTES = 8


@dataclass(frozen=True, slots=True)
class Records:
    """N records, packed as the catalog and a segment's footer keep them.

    Attributes:
        packed_ids: the ids as UTF-8, a NUL between two, zlib. Unpacked only to be shown: an id is
            known by its digest.
        digests: `id_digest` of each id, 16 N bytes.
        checksums: u64 of each record, 8 N bytes, little-endian.
    """

    packed_ids: bytes
    digests: bytes
    checksums: bytes

    @classmethod
    def pack(cls, ids: Sequence[str], digests: bytes, checksums: UInt64) -> Records:
        """Pack `ids` with their digests and the checksums uint64 [N] of their records."""
        packed = zlib.compress("\0".join(ids).encode(), 1)
        return cls(packed, digests, checksums.astype("<u8").tobytes())

    @classmethod
    def unpack(cls, content: bytes, num_records: int) -> Records:
        """Cut digests, checksums and packed ids out of `content`, where they follow so."""
        first, second = num_records * DIGEST_BYTES, num_records * (DIGEST_BYTES + CHECKSUM_BYTES)
        return cls(content[second:], content[:first], content[first:second])

    @classmethod
    def join(cls, parts: Sequence[Records]) -> Records:
        """Return the records of all `parts`, one after the other."""
        ids = [image_id for part in parts for image_id in part.ids()]
        digests = b"".join(part.digests for part in parts)
        return cls.pack(ids, digests, np.concatenate([part.checksum_array() for part in parts]))

    def split(self, size: int) -> list[Records]:
        """Return parts of at most `size` records."""
        ids, sums = self.ids(), self.checksum_array()
        return [
            Records.pack(
                ids[at : at + size],
                self.digests[at * DIGEST_BYTES : (at + size) * DIGEST_BYTES],
                sums[at : at + size],
            )
            for at in range(0, len(self), size)
        ]

    def ids(self) -> list[str]:
        """Unpack the ids.

        Raises:
            StoreError: the packed bytes are damaged. No more is unpacked than N ids can have.
        """
        limit = len(self) * (MAX_ID_BYTES + 1)
        try:
            found = zlib.decompressobj().decompress(self.packed_ids, limit).decode().split("\0")
        except (zlib.error, UnicodeDecodeError) as error:
            raise StoreError(
                f"the ids of {len(self)} records cannot be unpacked: {error}"
            ) from None
        if len(found) != len(self):
            raise StoreError(f"{len(found)} ids stand where {len(self)} records have one each")
        return found

    def digest_array(self) -> UInt64:
        """Return the digests as uint64 [N, 2], high half first, big-endian; a view."""
        return np.frombuffer(self.digests, ">u8").reshape(-1, 2)

    def checksum_array(self) -> UInt64:
        """Return the checksums as uint64 [N]; a view."""
        return np.frombuffer(self.checksums, "<u8")

    def is_sound(self) -> bool:
        """Return whether there is at least one record, and as many checksums as digests."""
        whole = len(self.digests) == len(self) * DIGEST_BYTES
        return len(self) > 0 and whole and len(self.checksums) == len(self) * CHECKSUM_BYTES

    def __len__(self) -> int:
        return len(self.digests) // DIGEST_BYTES


def digests_of(ids: Iterable[str]) -> bytes:
    """Return the digests of `ids`, 16 bytes each."""
    return b"".join(map(id_digest, ids))


def repeated(ids: Iterable[str]) -> list[str]:
    """Return the ids that came before, in order, each as often as it comes again."""
    seen: set[str] = set()
    return [image_id for image_id in ids if image_id in seen or seen.add(image_id)]  # type: ignore[func-returns-value]
