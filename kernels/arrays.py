"""Arrays in device memory, and the checks of what a kernel is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import EngineError

DTYPES = {
    name: np.dtype(name) for name in ("float16", "float32", "int8", "int32", "int64", "uint16")
}


class DeviceArray(Protocol):
    """A C-contiguous array in device memory, as `engines.contract.DeviceArray`."""

    @property
    def address(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


def raise_faults(operation: str, faults: Iterator[str]) -> None:
    if found := list(faults):
        raise EngineError(f"{operation} does not take these arrays", faults=found)


def array_faults(
    name: str, array: DeviceArray, dtype: str, shape: tuple[int, ...]
) -> Iterator[str]:
    # A dtype's name takes microseconds to make; bfloat16 is no dtype of NumPy's own.
    known = DTYPES.get(dtype)
    same = array.dtype == known if known is not None else array.dtype.name == dtype
    if not same or array.shape != shape:
        yield f"{name}: got {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}"


def scales_faults(
    name: str, array: DeviceArray | None, wanted: bool, shape: tuple[int, ...]
) -> Iterator[str]:
    """Yield what is wrong with scales, which int8 tokens have and float16 tokens have not."""
    if array is None and wanted:
        yield f"{name}: got none, int8 tokens need float16 {list(shape)}"
    elif array is not None and not wanted:
        yield f"{name}: got an array, float16 tokens have none"
    elif array is not None:
        yield from array_faults(name, array, "float16", shape)


def choice_faults(name: str, value: str, known: Sequence[str]) -> Iterator[str]:
    if value not in known:
        yield f"{name}: got {value!r}, expected one of {list(known)}"


def bounds_faults(name: str, value: int, most: int) -> Iterator[str]:
    if not 1 <= value <= most:
        yield f"{name}: got {value}, expected 1 to {most}"
