"""What a store gives to read: one generation of records, by id, by row, or all in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ...arguments import Arguments, is_whole, shown
from ...arrays import Float16, Int64, UInt64
from ...errors import RequestError, StoreError, named
from .format import StoreLayout
from .ids import RecordIndex
from .records import BadRecord

if TYPE_CHECKING:
    from .memory import Reader

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
    _records: RecordIndex
    _reader: Reader | None = None
    _closed = False

    def rows(self, ids: Iterable[str], *, missing: Literal["raise", "mark"] = "raise") -> Int64:
        """Return the row handles of `ids`: int64 [N], the caller's; the same id may come twice.

        A handle stays valid as long as this store is open (and not compacted by this object).

        Args:
            ids: any iterable, taken once.
            missing: `"raise"` on ids that the store does not hold, or `"mark"` them with -1.

        Raises:
            RequestError: ids that the store does not hold (up to 20 named, with the count); or
                arguments of another kind (all of them).
            StoreError: the store is closed.
        """
        if type(ids) is list and missing == "mark":  # as a server asks, a hundred at a time
            try:
                return self._index.rows(ids)[0]
            except TypeError:  # no strings: they are named below
                pass
        given = Arguments("rows")
        names = given.strings("ids", ids)
        given.choice("missing", missing, ("raise", "mark"))
        given.check()
        rows, unknown = self._index.rows(names)
        if unknown and missing == "raise":
            count = f"{len(unknown)} of {len(names)}"
            raise RequestError(
                f"{count} ids are not in the store {self.path}: {named(unknown)}",
                hint="`edje index` adds images; an id is the path below the indexed folder",
            )
        return rows

    def live_rows(self) -> Int64:
        """Return the row handles of all records: int64 [N], ascending, the caller's."""
        return self._index.live_rows()

    def digests(self) -> UInt64:
        """Return what tells which ids are here: the low 64 bits of each id's xxh3-128 digest.

        Returns:
            uint64 [N], ascending, host; not to be written to.

        Raises:
            StoreError: the store is closed.
        """
        return self._index.digests()

    def read(
        self,
        rows: Int64 | Iterable[int],
        out: Tokens,
        scales: Float16 | None = None,
        *,
        bad: Literal["raise", "mark"] = "raise",
        verify: bool = True,
    ) -> list[BadRecord]:
        """Copy records into `out` and verify each against its checksum.

        Args:
            rows: int64 [N] from `rows`, or any iterable of them, in any order, repeats allowed.
            out: the store's dtype [N, m, H], C-contiguous, host or pinned, the caller's; record i
                goes to `out[i]`. A bad record leaves zeros there.
            scales: float16 [N, m], C-contiguous, the caller's: int8 stores only.
            bad: `"raise"` on a bad record, or `"mark"` it in the returned list.
            verify: False trusts the bytes; only a record that cannot be read is bad then.

        Returns:
            The bad records by position: empty when all is well.

        Raises:
            StoreError: (`"raise"`) damaged records, each with id, segment, row and reason.
            RequestError: buffers that do not fit, rows that this store did not give out, or
                arguments of another kind.
        """
        reader, layout = self._open_reader(), self.layout
        rows = _rows_of(rows)
        _check_buffers(layout, len(rows), out, scales)
        if bad not in ("raise", "mark"):
            raise RequestError(f'bad is {bad!r}, expected "raise" or "mark"')
        if len(rows) == 0:
            return []
        plan = self._records.plan(rows)
        # Views of numbers, since memoryview cannot cast every dtype to bytes.
        buffer = out.view(np.uint8).data.cast("B")
        scale_bytes = None if scales is None else scales.view(np.uint8).data.cast("B")
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
            "images again",
        )

    def prefetch(self, rows: Int64 | Iterable[int]) -> None:
        """Ask the system to fetch records that will be read soon; returns at once."""
        rows, reader = _rows_of(rows), self._open_reader()
        if len(rows):
            reader.prefetch(rows)

    def iterate(
        self, batch_size: int = 256, *, bad: Literal["raise", "mark"] = "raise"
    ) -> Iterator[TokenBatch]:
        """Yield all records in the order they lie in the store; the arrays are the caller's.

        Raises:
            RequestError: arguments of another kind (all of them), at once.
            StoreError: (`"raise"`) a damaged record; the store is closed.
        """
        given = Arguments("iterate")
        batch_size = given.whole("batch_size", batch_size, "1 or more")
        given.choice("bad", bad, ("raise", "mark"))
        given.check()
        return self._batches(self._index.live_rows(), batch_size, bad)

    def _batches(
        self, rows: Int64, batch_size: int, bad: Literal["raise", "mark"]
    ) -> Iterator[TokenBatch]:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            self.prefetch(rows[start + batch_size : start + 2 * batch_size])
            out, scales = self.layout.buffers(len(part))
            found = self.read(part, out, scales, bad=bad)
            yield TokenBatch(tuple(self._index.ids_of(part)), out, scales, tuple(found))

    def checksums(self, rows: Int64 | Iterable[int]) -> UInt64:
        """Return the catalog's checksums of `rows`: uint64 [N], the caller's; reads no record.

        Raises:
            RequestError: rows that this store did not give out.
        """
        rows = _rows_of(rows)
        plan = self._index.plan(rows)
        sums = np.empty(len(rows), np.uint64)
        sums[plan.positions] = plan.checksums
        return sums

    def ids_of(self, rows: Int64 | Iterable[int]) -> list[str]:
        """Return the ids of `rows`, in their order: of a few in less time than `ids` takes for all.

        To rank everything, take `live_rows` and ask for the ids of the best rows only.

        Raises:
            RequestError: rows that this store did not give out.
        """
        rows, index = _rows_of(rows), self._index
        index.plan(rows)  # refuses what was never given out
        return index.ids_of(rows)

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

    @property
    def _index(self) -> RecordIndex:
        """What the store holds, as long as it is open."""
        self._open_reader()
        return self._records

    def _open_reader(self) -> Reader:
        """Return what reads the records, as long as the store is open."""
        if self._reader is None or self._closed:
            hint = "open it again with TokenStore.open"
            raise StoreError(f"the store {self.path} is closed", hint=hint)
        return self._reader


def _rows_of(rows: Int64 | Iterable[int]) -> Int64:
    """Return row handles of any iterable as int64 [N]; an array of them is not copied."""
    if not isinstance(rows, np.ndarray):
        given = Arguments("rows")
        found = given.items("rows", rows, "int64 [N], from `TokenStore.rows`")
        wrong = [shown(row) for row in found if not (is_whole(row, 0) and row < 1 << 63)]
        if wrong:
            given.faults.append(f"{len(wrong)} rows are no row handles: {', '.join(wrong[:20])}")
        given.check()
        return np.array(found, np.int64)
    if rows.dtype != np.int64 or rows.ndim != 1:
        raise RequestError(f"rows is {rows.dtype} {list(rows.shape)}, expected int64 [N]")
    return rows


def _check_buffers(layout: StoreLayout, count: int, out: object, scales: object) -> None:
    """Refuse arrays of a dtype, shape or kind that `count` records cannot be read into."""
    is_int8, shape = layout.dtype == "int8", (count, layout.num_tokens, layout.hidden)
    fits = _fits(out, np.int8 if is_int8 else np.float16, shape)
    if fits and (_fits(scales, np.float16, shape[:2]) if is_int8 else scales is None):
        return
    given = Arguments("read")
    for name, array in {"out": out, "scales": scales}.items():
        if not isinstance(array, np.ndarray) and (name == "out" or array is not None):
            given.refuse(name, array, "a NumPy array")
    given.check()
    faults = [] if fits else [_misfit("out", out, layout.dtype, shape)]
    if is_int8 and scales is None:
        faults.append("scales: got none, an int8 store needs float16 [N, m]")
    elif not is_int8 and scales is not None:
        faults.append(f"scales: got an array, a {layout.dtype} store has none")
    elif is_int8 and not _fits(scales, np.float16, shape[:2]):
        faults.append(_misfit("scales", scales, "float16", shape[:2]))
    raise RequestError("cannot read into these buffers", faults=faults)


def _fits(array: object, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(array, np.ndarray)
        and array.dtype == dtype
        and array.shape == shape
        and array.flags.c_contiguous
        and array.flags.writeable
    )


def _misfit(name: str, array: Any, dtype: str, shape: tuple[int, ...]) -> str:
    usable = array.flags.c_contiguous and array.flags.writeable
    got = f"{array.dtype} {list(array.shape)}, C-contiguous and writeable: {usable}"
    return f"{name}: got {got}; expected {dtype} {list(shape)}, True"
