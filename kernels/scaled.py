"""8-bit rows in device memory, with their scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..arrays import DeviceArray
from .launch import array_faults, rows_faults
from .layer_variants import UNIT
from .layer_variants8 import KINDS


class Scaled(NamedTuple):
    """Rows of 8-bit values: of activations, or of a weight with its outputs as rows.

    Attributes:
        values: int8, or E4M3 as uint8, [R, C], on 16 bytes; C is a multiple of 128.
        scales: float32 [R, C / 128]: what 128 columns of a row are multiplied by.
    """

    values: DeviceArray
    scales: DeviceArray

    def faults(self, name: str, kind: str, num_rows: int, columns: int) -> Iterator[str]:
        """Yield what is wrong with them, of which there may be more than are used."""
        yield from rows_faults(name, self.values, KINDS[kind].numpy, num_rows, columns)
        yield from rows_faults(f"{name}.scales", self.scales, "float32", num_rows, columns // UNIT)


class Copy(NamedTuple):
    """Where a step writes its 16-bit result a second time, or instead, in 8 bits.

    Attributes:
        rows: as many columns as the result.
        smooth: float32 [C], on 16 bytes: what columns are multiplied by before; ones where
            nothing is smoothed.
    """

    rows: Scaled
    smooth: DeviceArray

    def faults(self, name: str, kind: str, num_rows: int, columns: int) -> Iterator[str]:
        """Yield what is wrong with them."""
        yield from self.rows.faults(name, kind, num_rows, columns)
        yield from array_faults(f"{name}.smooth", self.smooth, "float32", (columns,))
