"""Records as callers hand them in and get them back: arrays checked, buffers for batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...arguments import Arguments, is_whole, plain, shown
from ...arrays import Array, Float16, Int8, Int64
from ...errors import RequestError, named
from ...tokens import quantize_tokens
from .format import StoreLayout
from .segment import RecordBytes

# Bits of a float16 from which on a value is infinity or NaN: as int16 those of a positive one, as
# uint16 those of a negative one.
POSITIVE_INFINITY, NEGATIVE_INFINITY = 0x7C00, 0xFC00


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
        _take_array(given, "tokens", tokens)
        if scales is not None:
            _take_array(given, "scales", scales)
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
        if not (faults or self.allow_nonfinite):
            faults = self._nonfinite_faults()
        return faults

    def packed(self, layout: StoreLayout) -> RecordBytes:
        """Return their bytes, without faults; views where nothing has to change."""
        tokens, scales = self.tokens, self.scales
        if layout.dtype == "int8" and scales is None:
            tokens, scales = quantize_tokens(tokens)
        return RecordBytes(_rows(tokens), None if scales is None else _rows(scales))

    def _nonfinite_faults(self) -> list[str]:
        places = nonfinite_records(self.tokens, self.scales)
        if not len(places):
            return []
        which = named([str(self.ids[place]) for place in places.tolist()])
        return [
            f"{len(places)} records hold NaN or infinity: {which} (allow_nonfinite=True lets them "
            "in; no engine can score them)"
        ]


def _take_array(given: Arguments, name: str, value: object) -> None:
    if not isinstance(value, np.ndarray):
        given.refuse(name, value, "a NumPy array")


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


def _rows(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the values as bytes, one row a record."""
    width = math.prod(values.shape[1:])  # reshape cannot tell it from no records
    return np.ascontiguousarray(values).reshape(len(values), width).view(np.uint8)


def rows_of(rows: object) -> Int64:
    """Return row handles of any iterable as int64 [N]; an array of them is not copied.

    Raises:
        RequestError: no row handles.
    """
    if not isinstance(rows, np.ndarray):
        given = Arguments("rows")
        found = given.items("rows", rows, "int64 [N], from `TokenStore.rows`")
        wrong = [shown(row) for row in found if not (is_whole(row, 0) and row < 1 << 63)]
        if wrong:
            given.faults.append(f"{len(wrong)} rows are no row handles: {', '.join(wrong[:20])}")
        given.check()
        rows = np.array(found, np.int64)
    if rows.dtype != np.int64 or rows.ndim != 1:
        raise RequestError(f"rows is {rows.dtype} {list(rows.shape)}, expected int64 [N]")
    return rows


def check_buffers(layout: StoreLayout, rows: Int64, out: Array, scales: Float16 | None) -> None:
    """Check what `rows` are to be read into.

    Raises:
        RequestError: another dtype, shape or kind of array (all faults named).
    """
    given = Arguments("read")
    _take_array(given, "out", out)
    if scales is not None:
        _take_array(given, "scales", scales)
    given.check()
    shape = (len(rows), layout.num_tokens, layout.hidden)
    faults = _buffer_faults("out", out, layout.dtype, shape)
    if layout.dtype == "int8" and scales is None:
        faults.append("scales: got none, an int8 store needs float16 [N, m]")
    elif layout.dtype != "int8" and scales is not None:
        faults.append(f"scales: got an array, a {layout.dtype} store has none")
    elif scales is not None:
        faults += _buffer_faults("scales", scales, "float16", shape[:2])
    if faults:
        raise RequestError("cannot read into these buffers", faults=faults)


def _buffer_faults(
    name: str, array: npt.NDArray[Any], dtype: str, shape: Sequence[int]
) -> list[str]:
    usable = array.flags.c_contiguous and array.flags.writeable
    if array.dtype == dtype and array.shape == tuple(shape) and usable:
        return []
    got = f"{array.dtype} {list(array.shape)}, C-contiguous and writeable: {usable}"
    return [f"{name}: got {got}; expected {dtype} {list(shape)}, True"]


MAX_BATCH_BYTES = 32 << 20


class BatchBuffers:
    """Buffers for up to `size` records of a layout: as many as fit 32 MiB, and no more than N."""

    def __init__(self, layout: StoreLayout, num_records: int):
        record_bytes = layout.record_bytes + layout.scale_bytes
        self.size = max(1, min(num_records, MAX_BATCH_BYTES // record_bytes))
        shape = (self.size, layout.num_tokens, layout.hidden)
        self._tokens = np.empty(shape, layout.dtype)
        self._scales = np.empty(shape[:2], np.float16) if layout.scale_bytes else None

    def views(self, num_records: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float16] | None]:
        """Return float16 or int8 [N, m, H] and, for int8, float16 [N, m]; overwritten next time."""
        scales = self._scales
        return self._tokens[:num_records], None if scales is None else scales[:num_records]
