"""What is known of a record (id, checksum, seed), and the footer that keeps it with the segment."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from ...arrays import UInt64
from ...errors import StoreError
from .format import FORMAT_VERSION, MAX_ID_BYTES, PAGE_BYTES, StoreLayout, id_digest

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


TRAILER = struct.Struct("<8sIIQQQQQQ")
FOOTER_MAGIC = b"EDJEFOOT"


def footer_bytes(records: Records, key: int) -> bytes:
    """Return the footer of the segment with this key that holds exactly `records`; whole pages."""
    content = b"".join([records.digests, records.checksums, records.packed_ids])
    check = xxhash.xxh3_64_intdigest(content)
    ids_bytes = len(records.packed_ids)
    values = (FOOTER_MAGIC, FORMAT_VERSION, 0, key, len(records), ids_bytes, check, 0)
    trailer = TRAILER.pack(*values, 0)[:-8]
    trailer += xxhash.xxh3_64_intdigest(trailer).to_bytes(8, "little")
    return content.ljust(_footer_size(len(content)) - TRAILER.size, b"\0") + trailer


def read_footer(
    descriptor: int, layout: StoreLayout, key: int | None = None
) -> tuple[int, Records] | str:
    """Return the key and the records that the footer of an open file names, or why it cannot.

    No size that it names is believed before it fits the file.

    Args:
        key: what the key must be; None takes any.

    Raises:
        OSError: the file cannot be read.
    """
    size = os.fstat(descriptor).st_size
    trailer = os.pread(descriptor, TRAILER.size, max(0, size - TRAILER.size))
    if len(trailer) < TRAILER.size or trailer[:8] != FOOTER_MAGIC:
        return "it has no footer"
    if trailer[-8:] != xxhash.xxh3_64_intdigest(trailer[:-8]).to_bytes(8, "little"):
        return "its footer is damaged (trailer)"
    _, version, _, found, num_rows, ids_bytes, check, _, _ = TRAILER.unpack(trailer)
    if version != FORMAT_VERSION or (key is not None and found != key):
        return f"its footer is another segment's (version {version}, key {found:016x})"
    length = num_rows * (DIGEST_BYTES + CHECKSUM_BYTES) + ids_bytes
    if num_rows > layout.max_rows or layout.end(num_rows) + _footer_size(length) != size:
        return f"its footer is damaged: {num_rows} records do not fit the {size} bytes of the file"
    footer = os.pread(descriptor, size - layout.end(num_rows), layout.end(num_rows))
    content, padding = footer[:length], footer[length : -TRAILER.size]
    if xxhash.xxh3_64_intdigest(content) != check or any(padding):
        return "its footer is damaged (checksum)"
    return found, Records.unpack(content, num_rows)


def _footer_size(content_bytes: int) -> int:
    return -(-(content_bytes + TRAILER.size) // PAGE_BYTES) * PAGE_BYTES
