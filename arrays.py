"""Arrays as this package names them: aliases, an array in a GPU's memory, and even parts of one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bool = npt.NDArray[np.bool_]
UInt8 = npt.NDArray[np.uint8]
Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """A C-contiguous array in a GPU's memory, owned by whoever allocated it.

    It stands where a NumPy array would in a `Batch` and for `scores`: an engine on a GPU takes
    these only, an engine on the CPU never. Nothing here reads or writes the memory.

    Attributes:
        address: of the first element, in the device's address space.
        shape: number of elements in each dimension.
        dtype: NumPy's name of the element type.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Return some of the rows as a view, as NumPy does; steps are not taken."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"rows of a DeviceArray come one after the other, got step {step}")
        shape = (max(stop - start, 0), *self.shape[1:])
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(self.address + start * row_bytes, shape, self.dtype)


def even_parts(num_pairs: int, most: int) -> Iterator[slice]:
    """Cut `num_pairs` into the fewest slices of at most `most`, equal within one; 0 into none."""
    num_parts = -(-num_pairs // most)
    ends = [num_pairs * part // max(1, num_parts) for part in range(num_parts + 1)]
    return (slice(start, end) for start, end in pairwise(ends))
