"""The footer of a sealed segment: its ids, digests and checksums, so that it explains itself.

Behind the last record, page-aligned: the digests (16 bytes a record), the checksums (u64 a record),
the ids (NUL between them, zlib), zeros. The last 64 bytes of its last page, with which the file
ends, are the trailer: magic, u32 version, u32 zero, u64 key, number of records, bytes of the ids,
xxh3-64 of digests, checksums and ids, zero, xxh3-64 of the trailer before.
"""

from __future__ import annotations

import os
import struct

import xxhash

from .layout import FORMAT_VERSION, PAGE_BYTES, StoreLayout
from .records import CHECKSUM_BYTES, DIGEST_BYTES, Records

TRAILER = struct.Struct("<8sIIQQQQQQ")
MAGIC = b"EDJEFOOT"


def footer_bytes(records: Records, key: int) -> bytes:
    """Return the footer of the segment with this key that holds exactly `records`; whole pages."""
    content = b"".join([records.digests, records.checksums, records.packed_ids])
    check = xxhash.xxh3_64_intdigest(content)
    ids_bytes = len(records.packed_ids)
    values = (MAGIC, FORMAT_VERSION, 0, key, len(records), ids_bytes, check, 0)
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
    if len(trailer) < TRAILER.size or trailer[:8] != MAGIC:
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
