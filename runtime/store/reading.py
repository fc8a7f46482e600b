"""What a store gives to read: one generation of records, by id, by row, or all in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import RequestError, StoreError, named
from .arrays import check_buffers
from .index import RecordIndex
from .layout import Int64, StoreLayout, UInt64
from .read.reader import BadRecord
from .read.resident import Reader

Float16 = npt.NDArray[np.float16]
Tokens = npt.NDArray[Any]


class TokenBatch(NamedTuple):
    """Records in the order of the store: N ids, tokens [N, m, H] of its dtype, scales for int8."""

    ids: tuple[str, ...]
    tokens: Tokens
    scales: Float16 | None
    bad: tuple[BadRecord, ...]


class ReadableStore:
    """The reading half of `TokenStore`. `path` and `layout` say which store it is."""

    path: Path
    layout: StoreLayout
    _index: RecordIndex
    _reader: Reader | None = None
    _closed = False

    def rows(self, ids: Sequence[str]) -> Int64:
        """Return the row handles of `ids`: int64 [N], the caller's; the same id may come twice.

        A handle stays valid as long as this store is open (and not compacted by this object).

        Raises:
            RequestError: ids that the store does not hold (up to 20 named, with the count).
        """
        rows, unknown = self._index.rows(ids)
        if unknown:
            count = f"{len(unknown)} of {len(ids)}"
            raise RequestError(
                f"{count} ids are not in the store {self.path}: {named(unknown)}",
                hint="`edje index` adds images; an id is the path below the indexed folder",
            )
        return rows

    def live_rows(self) -> Int64:
        """Return the row handles of all records: int64 [N], ascending, the caller's."""
        return self._index.live_rows()

    def read(
        self,
        rows: Int64,
        out: Tokens,
        scales: Float16 | None = None,
        *,
        bad: Literal["raise", "mark"] = "raise",
        verify: bool = True,
    ) -> list[BadRecord]:
        """Copy records into `out` and verify each against its checksum.

        Args:
            rows: int64 [N] from `rows`, in any order, repeats allowed.
            out: the store's dtype [N, m, H], C-contiguous, host or pinned, the caller's; record i
                goes to `out[i]`. A bad record leaves zeros there.
            scales: float16 [N, m], C-contiguous, the caller's: int8 stores only.
            bad: `"raise"` on a bad record, or `"mark"` it in the returned list.
            verify: False trusts the bytes; only a record that cannot be read is bad then.

        Returns:
            The bad records by position: empty when all is well.

        Raises:
            StoreError: (`"raise"`) damaged records, each with id, segment, row and reason.
            RequestError: buffers that do not fit, or rows that this store did not give out.
        """
        rows, reader = np.asarray(rows), self._open_reader()
        check_buffers(self.layout, rows, out, scales)
        if len(rows) == 0:
            return []
        plan = self._index.plan(rows)
        # Views of numbers, since memoryview cannot cast every dtype to bytes.
        scale_bytes = None if scales is None else scales.reshape(-1).view(np.uint8).data
        buffer = out.reshape(-1).view(np.uint8).data
        reasons = reader.gather(plan, buffer, scale_bytes, verify=verify)
        if not reasons:
            return []
        found = [self._index.bad_record(plan, place, why) for place, why in reasons.items()]
        found.sort(key=lambda record: record.position)
        if bad == "mark":
            return found
        raise StoreError(
            f"{len(found)} of {len(rows)} records of the store {self.path} are damaged",
            faults=[str(record) for record in found[:20]],
            hint=f"`edje store verify --repair {self.path}` takes them out; then index these "
            'images again. read(..., bad="mark") serves the others meanwhile',
        )

    def prefetch(self, rows: Int64) -> None:
        """Ask the system to fetch records that will be read soon; returns at once."""
        if len(rows) and not self._closed:
            self._open_reader().prefetch(rows)

    def iterate(
        self, batch_size: int = 256, *, bad: Literal["raise", "mark"] = "raise"
    ) -> Iterator[TokenBatch]:
        """Yield all records in the order they lie in the store; the arrays are the caller's.

        Raises:
            StoreError: (`"raise"`) a damaged record.
        """
        rows = self._index.live_rows()
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            self.prefetch(rows[start + batch_size : start + 2 * batch_size])
            out = np.empty((len(part), *self.record_shape), self.layout.dtype)
            scaled = self.layout.dtype == "int8"
            scales = np.empty((len(part), self.layout.num_tokens), np.float16) if scaled else None
            found = self.read(part, out, scales, bad=bad)
            yield TokenBatch(tuple(self._index.ids_of(part)), out, scales, tuple(found))

    def checksums(self, rows: Int64) -> UInt64:
        """Return the catalog's checksums of `rows`: uint64 [N], the caller's; reads no record.

        Raises:
            RequestError: rows that this store did not give out.
        """
        plan = self._index.plan(rows)
        sums = np.empty(len(rows), np.uint64)
        sums[plan.positions] = plan.checksums
        return sums

    def ids(self) -> list[str]:
        """Return all ids in the order of the records; a new list, the caller's."""
        return self._index.ids()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self._index

    @property
    def fingerprint_encoder(self) -> str:
        """The encoder that made the tokens."""
        return self.layout.fingerprint_encoder

    @property
    def record_shape(self) -> tuple[int, int]:
        """(m, H) of one record."""
        return (self.layout.num_tokens, self.layout.hidden)

    def _open_reader(self) -> Reader:
        if self._closed or self._reader is None:
            raise StoreError(f"the store {self.path} is closed")
        return self._reader
