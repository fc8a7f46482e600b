"""Stores of millions of images on a small disk: the first records are real, the others are holes.

A hole is a sparse segment file: it reads as zeros and takes no space. Header pages and catalog are
as a writer leaves them, so opening, resolving ids and verified reading do their whole work.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from ..arrays import Array, Int64
from ..runtime.store.catalog import Catalog, Change, Segment
from ..runtime.store.format import ROW_BITS, SEGMENTS, StoreLayout, header_page, segment_name
from ..runtime.store.records import RecordBatch, RecordBytes, Records, digests_of
from .random_model import APPENDED_AT_ONCE, HIDDEN, NUM_TOKENS, image_id, write_store


def write_wide_store(
    path: Path,
    num_ids: int,
    tokens: Array | None = None,
    scales: Array | None = None,
    *,
    asked: Collection[int] = (),
    encoder: str = "random",
) -> Path:
    """Write a store of `num_ids` images under the ids of `image_id`; return its path.

    Args:
        tokens: [K, m, H] of the first K <= N images; None: full-size float16 records, all holes.
        scales: float16 [K, m] of int8 tokens.
        asked: numbers of images that will be read. Only they (and the first K) have the checksum
            of their record: reading any other hole names it as damaged.
        encoder: fingerprint of the encoder that the store says it belongs to.
    """
    if tokens is None:
        tokens = np.empty((0, NUM_TOKENS, HIDDEN), np.float16)
    with write_store(path, tokens, scales, encoder=encoder) as store:
        layout = store.layout
    catalog = Catalog.open(path, writable=True)
    try:
        following = catalog.state().next_segment
        wanted = np.unique(np.fromiter(asked, np.int64, len(asked)))
        for segment, first in enumerate(range(len(tokens), num_ids, layout.max_rows), following):
            numbers = range(first, min(first + layout.max_rows, num_ids))
            _write_holes(path, layout, catalog, segment, numbers, wanted)
    finally:
        catalog.close()
    return path


def row_of(number: int | Int64, num_known: int, layout: StoreLayout) -> int | Int64:
    """Return the row handle of image `number` (int or int64 [N]).

    Args:
        num_known: real records of the store, all in its first segment.
    """
    if num_known > layout.max_rows:
        raise ValueError(f"{num_known} real records do not fit one segment")
    first = 2 if num_known else 1
    behind = np.asarray(number) - num_known
    holes = (first + behind // layout.max_rows) << ROW_BITS | behind % layout.max_rows
    found: Int64 = np.where(behind < 0, (1 << ROW_BITS) | np.asarray(number), holes)
    return found


def _write_holes(
    path: Path,
    layout: StoreLayout,
    catalog: Catalog,
    segment: int,
    numbers: range,
    wanted: Int64,
) -> None:
    """Write one segment of holes: its header page, its length, its records in the catalog."""
    with (path / SEGMENTS / segment_name(segment)).open("wb") as file:
        file.write(header_page(layout, segment))
        file.truncate(layout.end(len(numbers)))
    batches = [
        RecordBatch(segment, at, _records(layout, numbers[at : at + APPENDED_AT_ONCE], wanted))
        for at in range(0, len(numbers), APPENDED_AT_ONCE)
    ]
    info = Segment(num_rows=len(numbers), sealed=True, key=segment)
    catalog.commit(Change(added=batches, segments={segment: info}))


def _records(layout: StoreLayout, numbers: range, wanted: Int64) -> Records:
    ids = [image_id(number) for number in numbers]
    sums = np.zeros(len(ids), np.uint64)
    low, high = np.searchsorted(wanted, (numbers.start, numbers.stop))
    at = wanted[low:high] - numbers.start
    if len(at):
        digests = digests_of([ids[i] for i in at.tolist()])
        sums[at] = RecordBytes.zeros(layout, len(at)).checksums(digests)
    return Records.pack(ids, digests_of(ids), sums)
