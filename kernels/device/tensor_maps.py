"""Tensor maps: what a GPU's copy engine knows of a 2-D array, encoded by the driver."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from ...arrays import DeviceArray
from . import facts

NUM_BYTES = 128
# Of a CUtensorMap since CUDA 13. The bindings let the driver write into an object that lies on 16
# bytes, so it is called without them.
ALIGNMENT = 128
L2_PROMOTION_128B = 2


def encode(
    array: DeviceArray, block: tuple[int, ...], stride: int, swizzle: int, element: int
) -> np.void:
    """Return the 128 bytes of a map of rows, `stride` elements apart.

    What lies outside of the array is read as zeros, and is not written.

    Args:
        block: rows and columns that one copy moves.
        swizzle, element: the driver's numbers of a swizzle and of an element type.

    Raises:
        ValueError: the driver's number of the error, where it refuses the map.
    """
    sizes, rank = array.shape, len(block)
    room = (ctypes.c_uint8 * (NUM_BYTES + ALIGNMENT))()
    place = -(-ctypes.addressof(room) // ALIGNMENT) * ALIGNMENT
    wide, narrow = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
    error = _encode_tiled()(
        ctypes.c_void_p(place),
        ctypes.c_int(element),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(array.address),
        wide(*reversed(sizes)),  # the driver counts dimensions from the innermost
        (ctypes.c_uint64 * (rank - 1))(stride * array.dtype.itemsize),
        narrow(*reversed(block)),
        narrow(*[1] * rank),
        ctypes.c_int(0),  # no interleave
        ctypes.c_int(swizzle),
        ctypes.c_int(L2_PROMOTION_128B),
        ctypes.c_int(0),  # zeros outside
    )
    if error:
        raise ValueError(error)
    encoded: np.void = np.void(ctypes.string_at(place, NUM_BYTES))
    return encoded


def _encode_tiled() -> Any:
    return facts.driver_library().cuTensorMapEncodeTiled
