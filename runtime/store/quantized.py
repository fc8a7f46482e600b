"""The caller's tokens -> the bytes that a store of this layout keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...engines.int8_tokens import quantize_tokens
from ...errors import StoreError
from .layout import StoreLayout
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
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    if not flat.size:
        return np.empty((len(values), flat.shape[-1] * values.itemsize), np.uint8)
    return flat.view(np.uint8)
