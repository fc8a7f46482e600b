"""The caller's arrays: tokens into record bytes, and buffers to read into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...engines.int8_tokens import quantize_tokens
from ...errors import RequestError, StoreError
from .layout import Int64, StoreLayout
from .segment_file import RecordBytes


def record_bytes_of(
    layout: StoreLayout,
    num_records: int,
    tokens: npt.NDArray[Any],
    scales: npt.NDArray[np.float16] | None,
) -> RecordBytes:
    """Return the bytes of N records; views where nothing has to change.

    Args:
        tokens: float16 [N, m, H], quantised here for an int8 store; or int8 [N, m, H].
        scales: float16 [N, m] with int8 tokens, None with float16 ones.

    Raises:
        StoreError: another dtype or shape (all faults named).
    """
    shape = (num_records, layout.num_tokens, layout.hidden)
    faults = []
    if tokens.shape != shape or tokens.dtype not in (np.float16, layout.dtype):
        kinds = " or ".join(dict.fromkeys(["float16", layout.dtype]))
        faults.append(
            f"tokens: got {tokens.dtype} {list(tokens.shape)}, expected {kinds} {list(shape)}"
        )
    if (tokens.dtype == np.int8) != (scales is not None):
        expected = "float16 [N, m]" if tokens.dtype == np.int8 else "none with float16 tokens"
        faults.append(f"scales: got {'none' if scales is None else 'some'}, expected {expected}")
    elif scales is not None and (scales.dtype != np.float16 or scales.shape != shape[:2]):
        got = f"{scales.dtype} {list(scales.shape)}"
        faults.append(f"scales: got {got}, expected float16 {list(shape[:2])}")
    if faults:
        raise StoreError("these are no records of the store, nothing has changed", faults=faults)
    if layout.dtype == "int8" and scales is None:
        tokens, scales = quantize_tokens(tokens)
    return RecordBytes(_rows(tokens), None if scales is None else _rows(scales))


def _rows(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the values as bytes, one row a record."""
    width = math.prod(values.shape[1:])  # reshape cannot tell it from no records
    return np.ascontiguousarray(values).reshape(len(values), width).view(np.uint8)


def check_buffers(
    layout: StoreLayout,
    rows: Int64,
    out: npt.NDArray[Any],
    scales: npt.NDArray[np.float16] | None,
) -> None:
    """Check what `rows` are to be read into.

    Raises:
        RequestError: another dtype, shape or kind of array (all faults named).
    """
    if rows.dtype != np.int64 or rows.ndim != 1:
        raise RequestError(f"rows is {rows.dtype} {list(rows.shape)}, expected int64 [N]")
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
