"""A kernel's arguments as the driver takes them: an array of addresses of packed values."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

ALIGNMENT = 64  # of a tensor map, the strictest of all


class ArgumentBlock:
    """Memory for arguments of certain types; made once, written before every launch.

    Attributes:
        address: of the array of addresses: `kernelParams` of `cuLaunchKernel`.
    """

    def __init__(self, types: Sequence[np.dtype[np.generic]]):
        """Lay out values of these types."""
        offsets, end = [], 0
        for kind in types:
            unit = ALIGNMENT if kind.kind == "V" else kind.itemsize
            offsets.append(-(-end // unit) * unit)
            end = offsets[-1] + kind.itemsize
        names = [str(place) for place in range(len(types))]
        layout = np.dtype(
            {"names": names, "formats": list(types), "offsets": offsets, "itemsize": max(end, 1)}
        )
        memory = np.zeros(layout.itemsize + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        self._values = memory[start : start + layout.itemsize].view(layout)
        first = memory.ctypes.data + start
        self._addresses = (ctypes.c_void_p * len(types))(*(first + offset for offset in offsets))
        self.address = ctypes.addressof(self._addresses)

    def write(self, arguments: Sequence[np.generic]) -> None:
        """Put one launch's arguments in."""
        self._values[0] = tuple(arguments)
