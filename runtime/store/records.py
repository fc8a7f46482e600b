"""Records: as callers hand them in, their bytes, and what is known of each (id, checksum)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from ...arguments import Arguments, plain
from ...arrays import Array, Float16, Int8, Int64, UInt8, UInt64
from ...errors import StoreError, named
from ...tokens import quantize_tokens
from .format import MAX_ID_BYTES, ROW_BITS, StoreLayout, id_digest, id_fault

DIGEST_BYTES = 16
CHECKSUM_BYTES = 8
ROWS_A_BATCH = 1024
# Bits of a float16 from which on a value is infinity or NaN: as int16 those of a positive one, as
# uint16 those of a negative one.
POSITIVE_INFINITY, NEGATIVE_INFINITY = 0x7C00, 0xFC00


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


class RecordBatch(NamedTuple):
    """Records that lie one after the other in one segment."""

    segment: int
    first_row: int
    records: Records

    @property
    def first_location(self) -> int:
        """The row handle of the first record; the others follow one by one."""
        return self.segment << ROW_BITS | self.first_row

    @property
    def stop_row(self) -> int:
        """The row behind the last record."""
        return self.first_row + len(self.records)

    @property
    def locations(self) -> Int64:
        """The row handles int64 [N] of all."""
        return np.arange(len(self.records)) + self.first_location


def batches_of(segment: int, records: Records) -> list[RecordBatch]:
    """Return all records of a sealed segment as the catalog keeps them."""
    ids, sums, size = records.ids(), records.checksum_array(), ROWS_A_BATCH
    return [
        RecordBatch(
            segment,
            at,
            Records.pack(
                ids[at : at + size],
                records.digests[at * DIGEST_BYTES : (at + size) * DIGEST_BYTES],
                sums[at : at + size],
            ),
        )
        for at in range(0, len(records), size)
    ]


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that could not be read whole. `position` is its place in the requested rows."""

    position: int
    id: str
    segment: int
    row: int
    reason: str

    def __str__(self) -> str:
        return f"id {self.id!r} (segment {self.segment}, row {self.row}): {self.reason}"


class ReadPlan(NamedTuple):
    """What to read, sorted by location, each [N]: where to, from where, and what it must hash to.

    `positions` int64: rows of the caller's buffer; `locations` int64; `seeds`, `checksums` uint64.
    """

    positions: Int64
    locations: Int64
    seeds: UInt64
    checksums: UInt64


class RecordBytes(NamedTuple):
    """The bytes of N records: uint8 [N, record_bytes], and scales uint8 [N, scale_bytes] (int8)."""

    tokens: UInt8
    scales: UInt8 | None

    @classmethod
    def zeros(cls, layout: StoreLayout, count: int) -> RecordBytes:
        """Return memory for the bytes of `count` records."""
        scales = np.zeros((count, layout.scale_bytes), np.uint8) if layout.scale_bytes else None
        return cls(np.zeros((count, layout.record_bytes), np.uint8), scales)

    def cut(self, start: int, stop: int) -> RecordBytes:
        """Return records `start` to `stop`; views."""
        scales = None if self.scales is None else self.scales[start:stop]
        return RecordBytes(self.tokens[start:stop], scales)

    def checksums(self, digests: bytes) -> UInt64:
        """Return the checksums uint64 [N] of records whose ids have these digests."""
        seeds = np.frombuffer(digests, ">u8")[1::2].tolist()
        hashed = xxhash.xxh3_64_intdigest
        if self.scales is not None:
            seeds = [hashed(row.data, seed) for row, seed in zip(self.scales, seeds, strict=True)]
        sums = (hashed(row.data, seed) for row, seed in zip(self.tokens, seeds, strict=True))
        return np.fromiter(sums, np.uint64, len(self.tokens))


class NewRecords(NamedTuple):
    """Records that a caller wants to add, as they were given.

    Attributes:
        ids: N of them, checked to be in a list, but not to be ids.
        tokens: float16 [N, m, H], quantised here for an int8 store; or int8 [N, m, H].
        scales: float16 [N, m] with int8 tokens, None with float16 ones.
        allow_nonfinite: whether NaN and infinity may be among them.
    """

    ids: list[str]
    tokens: Array
    scales: Float16 | None
    allow_nonfinite: bool

    @classmethod
    def take(
        cls, ids: object, tokens: object, scales: object, allow_nonfinite: object
    ) -> NewRecords:
        """Take what a caller gave; `ids` may be any iterable in the order of the tokens.

        Raises:
            RequestError: arguments of another kind (all of them).
        """
        given = Arguments("append")
        names = plain(given.items("ids", ids, "a list of ids", paired=True))
        for name, value in {"tokens": tokens, "scales": scales}.items():
            if not isinstance(value, np.ndarray) and (name == "tokens" or value is not None):
                given.refuse(name, value, "a NumPy array")
        given.flag("allow_nonfinite", allow_nonfinite)
        given.check()
        return cls(names, tokens, scales, allow_nonfinite)  # type: ignore[arg-type]

    def faults(self, layout: StoreLayout) -> list[str]:
        """Return one sentence for everything that keeps the arrays out of such a store."""
        tokens, scales = self.tokens, self.scales
        shape = (len(self.ids), layout.num_tokens, layout.hidden)
        faults = []
        if tokens.shape != shape or tokens.dtype not in (np.float16, layout.dtype):
            kinds = " or ".join(dict.fromkeys(["float16", layout.dtype]))
            faults.append(
                f"tokens: got {tokens.dtype} {list(tokens.shape)}, expected {kinds} {list(shape)}"
            )
        if (tokens.dtype == np.int8) != (scales is not None):
            expected = "float16 [N, m]" if tokens.dtype == np.int8 else "none with float16 tokens"
            got = "none" if scales is None else "some"
            faults.append(f"scales: got {got}, expected {expected}")
        elif scales is not None and (scales.dtype != np.float16 or scales.shape != shape[:2]):
            got = f"{scales.dtype} {list(scales.shape)}"
            faults.append(f"scales: got {got}, expected float16 {list(shape[:2])}")
        if faults or self.allow_nonfinite:
            return faults
        odd = nonfinite_records(tokens, scales).tolist()
        which = named([str(self.ids[at]) for at in odd])
        why = "(allow_nonfinite=True lets them in; no engine can score them)"
        return [f"{len(odd)} records hold NaN or infinity: {which} {why}"] if odd else []

    def packed(self, layout: StoreLayout) -> RecordBytes:
        """Return their bytes, without faults; views where nothing has to change."""
        tokens, scales = self.tokens, self.scales
        if layout.dtype == "int8" and scales is None:
            tokens, scales = quantize_tokens(tokens)
        return RecordBytes(_rows(tokens), None if scales is None else _rows(scales))


def nonfinite_records(values: Array, scales: Float16 | None = None) -> Int64:
    """Return the places, int64, of the records in float16 [N, ...] that hold NaN or infinity.

    With `scales`, float16 [N, m], the values are int8 [N, m, H] and count as they are scaled.

    The largest of some integers, twice, takes a twentieth of the time of `np.isfinite`: 0.9 us a
    record of 64 x 384, where appending takes 29 us at least (an AMD EPYC, in the page cache).
    """
    if scales is not None:
        values = _largest(values, scales)
    if not values.size:
        return np.empty(0, np.int64)
    rows = np.ascontiguousarray(values).reshape(len(values), -1)
    positive, negative = rows.view(np.int16), rows.view(np.uint16)
    if positive.max() < POSITIVE_INFINITY and negative.max() < NEGATIVE_INFINITY:
        return np.empty(0, np.int64)
    wrong = positive.max(axis=1) >= POSITIVE_INFINITY
    wrong |= negative.max(axis=1) >= NEGATIVE_INFINITY
    return np.flatnonzero(wrong)


def _largest(tokens: Int8, scales: Float16) -> Float16:
    """Return float16 [N, m] that are not finite where a value of a token, scaled, is not."""
    if not scales.size or np.abs(scales).max() * np.float32(128) <= np.finfo(np.float16).max:
        return scales
    with np.errstate(over="ignore", invalid="ignore"):
        peaks = np.abs(tokens.astype(np.int16)).max(axis=-1).astype(np.float16)
        return np.where(np.isfinite(scales), peaks * scales, scales)


def _rows(values: Array) -> UInt8:
    """Return the values as bytes, one row a record."""
    width = math.prod(values.shape[1:])  # reshape cannot tell it from no records
    return np.ascontiguousarray(values).reshape(len(values), width).view(np.uint8)


def digests_of(ids: Iterable[str]) -> bytes:
    """Return the digests of `ids`, 16 bytes each."""
    return b"".join(map(id_digest, ids))


def no_ids(ids: Iterable[object]) -> list[str]:
    """Return a sentence that says which of `ids` cannot be ids, if there are some."""
    wrong = [f"{image_id!r:.80} {why}" for image_id in ids if (why := id_fault(image_id))]
    return [f"{len(wrong)} are no ids: {'; '.join(wrong[:20])}"] if wrong else []


def repeated(ids: Iterable[str], before: Container[str] = ()) -> list[str]:
    """Return a sentence that says which of `ids` come twice, or were there `before`, if any."""
    seen, twice = set[str](), []
    for image_id in ids:
        if image_id in seen or image_id in before:
            twice.append(image_id)
        seen.add(image_id)
    return [f"{len(twice)} ids come twice: {named(twice)}"] if twice else []
