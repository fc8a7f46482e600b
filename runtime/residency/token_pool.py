"""Records that stay in a GPU's memory, and the kernels that copy them in and out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import EngineError
from ...kernels.launch import KernelLibrary
from ...kernels.records import GatherTokens, ScatterTokens
from ..device.protocol import Device, Stream
from .resident_map import ResidentMap

Int64 = npt.NDArray[np.int64]


class Records(NamedTuple):
    """Records on a device: tokens [N, m, H]; scales [N, m] where they are int8, else None."""

    tokens: Any
    scales: Any


class TokenPool:
    """Memory for `capacity` records on one device, and the map of what lies where.

    All its copies go through one compute stream, whose order keeps a record's arrival before its
    first use, and its last use before the arrival of the next one at its place.

    Attributes:
        map: which rows are held, and where.
        checks_finite: take no record in that holds NaN or infinity (some engine hides them).
    """

    def __init__(
        self,
        device: Device,
        rows: Int64,
        capacity: int,
        *,
        shape: tuple[int, int],
        dtype: str,
        checks_finite: bool,
    ):
        """Allocate the memory and load the kernels; the device stays the caller's.

        Args:
            rows: int64: every row that may be held, ascending.
            capacity: records there is room for.
            shape: (m, H) of a record.
            dtype: `float16`, or `int8` with scales.

        Raises:
            EngineError: the device runs no kernels, or has not so much memory.
        """
        capability = pool_capability(device)
        self.map = ResidentMap(rows, capacity)
        self.checks_finite = checks_finite
        self.shape, self.dtype = shape, dtype
        with device.current():
            self._held = record_memory(device, capacity, shape, dtype)
            library = KernelLibrary(device, capability)
            self._gather = GatherTokens(library, token_dtype=dtype, row_dtype="int32")
            self._scatter = ScatterTokens(library, token_dtype=dtype, place_dtype="int32")

    def gather(self, places: Any, out: Records, stream: Stream) -> None:
        """Copy the records at `places` (int32 [P], -1: none) to their pairs, in stream order."""
        self.copy(self._held, places, out, stream)

    def copy(self, records: Records, places: Any, out: Records, stream: Stream) -> None:
        """As `gather`, from other records on the device."""
        scales = {"scales": records.scales, "out_scales": out.scales}
        self._gather.enqueue(records.tokens, places, out.tokens, stream=stream, **scales)

    def scatter(self, records: Records, places: Any, stream: Stream) -> None:
        """Copy records into the pool at `places` (int32 [N], -1: not at all), in stream order."""
        scales = {"scales": records.scales, "pool_scales": self._held.scales}
        self._scatter.enqueue(records.tokens, places, self._held.tokens, stream=stream, **scales)


def pool_capability(device: Device) -> tuple[int, int]:
    """Return the compute capability of a device that can keep a pool.

    Raises:
        EngineError: it has no memory of its own.
    """
    if device.compute_capability is None:
        raise EngineError(
            f"the device {device.name} has no memory of its own to keep tokens in",
            hint='residency="host" keeps them in this machine\'s memory',
        )
    return device.compute_capability


def record_bytes(shape: tuple[int, int], dtype: str) -> int:
    """Return the bytes of one record of (m, H) values, its scales included."""
    num_tokens, hidden = shape
    scale_bytes = 2 * num_tokens if dtype == "int8" else 0
    return num_tokens * hidden * np.dtype(dtype).itemsize + scale_bytes


def record_memory(device: Device, num_records: int, shape: tuple[int, int], dtype: str) -> Records:
    """Allocate device memory for records of (m, H) values."""
    num_tokens, hidden = shape
    tokens = device.memory(num_records * num_tokens * hidden, np.dtype(dtype))
    view = tokens.view((num_records, num_tokens, hidden))
    if dtype != "int8":
        return Records(view, None)
    scales = device.memory(num_records * num_tokens, np.dtype("float16"))
    return Records(view, scales.view((num_records, num_tokens)))
