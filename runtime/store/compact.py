"""Giving the space of deleted records back: live records move into new segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...arguments import Progress
from ...arrays import Int64
from ...errors import RequestError
from .catalog import CatalogState, Change, RecordBatch, Segment
from .format import StoreLayout
from .ids import RecordIndex
from .memory import Reader
from .records import digests_of
from .segment import RecordBytes
from .writer import StoreWriter

RECORDS_A_READ = 512


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What `compact` did.

    Attributes:
        num_moved: records that were written again.
        num_dropped: segments that the store does without now.
        freed_bytes: how much less the store's folder takes on disk than before, as `du` counts
            it; negative where files that open readers need stay beside their successors.
        waiting_bytes: of these files: they go when the store is opened for changes, or compacted,
            after the readers have closed.
        left: segments that stay because they hold damaged records, with the reason.
    """

    num_moved: int
    num_dropped: int
    freed_bytes: int
    waiting_bytes: int
    left: tuple[str, ...]


def move_records(
    writer: StoreWriter,
    index: RecordIndex,
    reader: Reader,
    max_dead_share: float,
    progress: Progress | None = None,
) -> tuple[int, int, list[str]]:
    """Move the live records out of segments with too many deleted ones, one commit a segment.

    Segments less than half full are joined as well. `index` is out of date afterwards.

    Returns:
        How many records were moved, how many segments dropped, and why others stay.

    Raises:
        RequestError: `max_dead_share` is no share.
        StoreError: no room on the disk; what was committed before stays.
    """
    if not 0 <= max_dead_share < 1:
        raise RequestError(f"max_dead_share is {max_dead_share}, expected 0 or more, less than 1")
    with writer.catalog.snapshot() as state:
        pass
    victims = _victims(writer.layout, index, state, max_dead_share)
    if writer.appender.active in victims:
        writer.appender.start_anew()
    moved, left = 0, []
    for number, segment in enumerate(victims):
        rows = index.live_rows(segment)
        damaged = _move(writer, index, reader, segment, rows)
        left += [f"segment {segment} stays: {why}" for why in damaged]
        moved += 0 if damaged else len(rows)
        if progress:
            progress(number + 1, len(victims))
    writer.seal_full()
    return moved, len(victims) - len(left), left


def _victims(
    layout: StoreLayout, index: RecordIndex, state: CatalogState, max_dead_share: float
) -> list[int]:
    live = {segment: len(index.live_rows(segment)) for segment in state.segments}
    dead = [
        segment
        for segment, info in state.segments.items()
        if info.num_rows - live[segment] > max_dead_share * info.num_rows
    ]
    small = [segment for segment, count in live.items() if 2 * count < layout.max_rows]
    return sorted({*dead, *(small if len(small) > 1 else [])})


def _move(
    writer: StoreWriter,
    index: RecordIndex,
    reader: Reader,
    segment: int,
    rows: Int64,
) -> list[str]:
    """Write the live records of a segment anew and drop it; return why it cannot go."""
    ids = index.ids_of(rows)
    batches: list[RecordBatch] = []
    segments: dict[int, Segment] = {}
    with writer.writing("compact"):
        mark = writer.appender.mark()
        for start, records in _read(writer.layout, index, reader, rows):
            if isinstance(records, str):
                writer.appender.rollback(mark)
                return [records]
            names = ids[start : start + len(records.tokens)]
            batches += writer.appender.write(names, digests_of(names), records)
            segments |= writer.appender.segments_of(batches)
    writer.commit(Change(batches, segments, dropped=[segment]))
    return []


def _read(
    layout: StoreLayout, index: RecordIndex, reader: Reader, rows: Int64
) -> Iterator[tuple[int, RecordBytes | str]]:
    """Yield (first place, records) of `rows`, verified, or which of them is damaged."""
    for start in range(0, len(rows), RECORDS_A_READ):
        plan = index.plan(rows[start : start + RECORDS_A_READ])
        count = len(plan.locations)
        tokens = np.empty((count, layout.record_bytes), np.uint8)
        scales = np.empty((count, layout.scale_bytes), np.uint8) if layout.scale_bytes else None
        out = None if scales is None else scales.reshape(-1).data
        bad = reader.gather(plan, tokens.reshape(-1).data, out)
        for place, reason in bad.items():
            yield start, str(index.bad_record(plan, place, reason))
            return
        yield start, RecordBytes(tokens, scales)
