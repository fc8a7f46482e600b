"""Segment files written by hand, byte by byte as the format says, and plans to read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from edje.runtime.store.format import PAGE_BYTES, StoreLayout, header_page
from edje.runtime.store.read import SegmentReader
from edje.runtime.store.records import ReadPlan

ROWS = 70  # of each segment: more than two groups of int8 records
SEGMENTS = 3

# name -> (num_tokens, hidden, dtype): records of whole pages, and padded ones.
SHAPES = {
    "float16": (32, 64, "float16"),
    "float16 padded": (2, 3, "float16"),
    "int8": (64, 64, "int8"),
    "int8 padded": (64, 70, "int8"),
}


def layout_of(shape: str) -> StoreLayout:
    """A layout of small records."""
    num_tokens, hidden, dtype = SHAPES[shape]
    return StoreLayout(num_tokens, hidden, dtype, "sha256:tower", 1 << 30, "a test")


def key_of(segment: int) -> int | None:
    """The key in the header page of each segment."""
    return 1000 + segment if 0 <= segment < SEGMENTS else None


@dataclass(frozen=True)
class RecordFiles:
    """A folder of segments. Record i = segment * ROWS + row: `tokens[i]`, `scales[i]` (bytes)."""

    folder: Path
    layout: StoreLayout
    tokens: np.ndarray
    scales: np.ndarray

    def reader(self, access: str = "cached") -> SegmentReader:
        """A new reader; the caller closes it."""
        return SegmentReader(self.folder, self.layout, key_of=key_of, access=access)  # type: ignore[arg-type]

    def path(self, segment: int) -> Path:
        """The file of a segment."""
        return self.folder / "segments" / f"{segment:06d}.tokens"

    def plan(self, records: np.ndarray) -> ReadPlan:
        """How to read the records with these numbers, record n into row n."""
        records = np.asarray(records, np.int64)
        positions = np.argsort(records, kind="stable")
        ordered = records[positions]
        locations = (ordered // ROWS) << 32 | ordered % ROWS
        checksums = [self.checksum(int(record)) for record in ordered]
        return ReadPlan(
            positions, locations, ordered.astype(np.uint64), np.array(checksums, np.uint64)
        )

    def checksum(self, record: int) -> int:
        """What the record must hash to, with its number in the place of its id's hash."""
        seed = record
        if self.layout.scale_bytes:
            seed = xxhash.xxh3_64_intdigest(self.scales[record].tobytes(), seed)
        return int(xxhash.xxh3_64_intdigest(self.tokens[record].tobytes(), seed))


def write_files(folder: Path, shape: str) -> RecordFiles:
    """Write three segments of 70 records of random bytes."""
    layout = layout_of(shape)
    random = np.random.default_rng(0)
    count = ROWS * SEGMENTS
    tokens = random.integers(1, 255, (count, layout.record_bytes), np.uint8)
    scales = random.integers(1, 255, (count, layout.scale_bytes), np.uint8)
    (folder / "segments").mkdir(parents=True)
    files = RecordFiles(folder, layout, tokens, scales)
    for segment in range(SEGMENTS):
        own = slice(segment * ROWS, (segment + 1) * ROWS)
        header = header_page(layout, 1000 + segment)
        files.path(segment).write_bytes(header + _content(layout, tokens[own], scales[own]))
    return files


def _content(layout: StoreLayout, tokens: np.ndarray, scales: np.ndarray) -> bytes:
    """The bytes behind the header: pages of scales (int8), records padded to whole pages."""
    padded = [_to_pages(record.tobytes()) for record in tokens]
    if not layout.scale_bytes:
        return b"".join(padded)
    group = PAGE_BYTES // layout.scale_bytes
    return b"".join(
        _to_pages(scales[at : at + group].tobytes()) + b"".join(padded[at : at + group])
        for at in range(0, len(tokens), group)
    )


def _to_pages(content: bytes) -> bytes:
    return content + bytes(-len(content) % PAGE_BYTES)
