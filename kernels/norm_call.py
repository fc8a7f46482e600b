"""Residual and LayerNorm as a typed call: which kernel serves a width, checks, launch.

As in `layers`, whose rules hold here.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..arrays import DeviceArray
from .device.contract import Stream
from .launch import (
    MOST_SLOTS,
    KernelLibrary,
    array_faults,
    bounds_faults,
    choice_faults,
    multiple_faults,
    raise_faults,
    rows_faults,
    stride_faults,
)
from .layer_variants import ACTIVATIONS, NORM_COLUMNS, NORM_ROWS, UNIT, add_norm_name
from .layer_variants8 import KINDS, WIDE, add_norm8_name
from .scaled import Copy


class AddNorm:
    """`references.add_norm` on the device: rows plus their residual through a LayerNorm."""

    def __init__(
        self,
        library: KernelLibrary,
        *,
        dtype: str,
        hidden: int,
        width: int,
        epsilon: float,
        copy: str | None = None,
    ):
        """Load the kernel.

        Args:
            dtype: `float16` or `bfloat16`, of rows and results; sums are float32.
            hidden: values of a row that count, a multiple of 16.
            width: values of a row, those past `hidden` 0: at most 1,024.
            epsilon: of the LayerNorm.
            copy: `int8` or `fp8`, in which float16 results are written a second time.

        Raises:
            EngineError: choices that no kernel takes (all at once), or no kernel for this GPU.
        """
        raise_faults("add_norm", _norm_faults(dtype, hidden, width, copy))
        columns = min(size for size in NORM_COLUMNS if size >= width)
        name = add_norm_name(dtype, columns) if copy is None else add_norm8_name(copy, columns)
        self._kernel = library.kernel(name)
        self._dtype, self._width, self._copy = dtype, width, copy
        self._constants: dict[str, float] = {"hidden": hidden, "width": width, "epsilon": epsilon}

    def enqueue(
        self,
        x: DeviceArray,
        residual: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray,
        out: DeviceArray,
        control: DeviceArray,
        *,
        num_pairs: int,
        rows_per_pair: int,
        stream: Stream,
        residual_stride: int | None = None,
        copy: Copy | None = None,
    ) -> None:
        """Write the first rows of `out`, `rows_per_pair` for each pair; returns at once.

        Args:
            x, residual: [at least the rows, width] of the dtype, on 16 bytes.
            weight, bias: float32 [width], on 16 bytes.
            out: [at least the rows, width], on 16 bytes, written; it may be `x`, or `residual`
                without a stride of its own.
            control: int64 [2].
            num_pairs: the most pairs that `control` will say.
            rows_per_pair: the slots of a pair, or 1.
            residual_stride: elements from one row of `residual` to the next, a multiple of 16;
                None: the width.
            copy: gets what `out` gets in 8 bits, where the kernel was loaded for that; written.

        Raises:
            EngineError: arrays that do not fit (all faults at once).
        """
        stride = self._width if residual_stride is None else residual_stride
        num_rows = num_pairs * rows_per_pair
        arrays = (x, residual, weight, bias, out, control)
        raise_faults("add_norm", self._faults(arrays, num_rows, stride, copy))
        copies = {}
        if copy is not None:
            copies = {"copy": copy.rows.values.address, "scales": copy.rows.scales.address}
            copies["smooth"] = copy.smooth.address
        self._kernel.launch(
            stream,
            -(-num_rows // NORM_ROWS),
            x=x.address,
            residual=residual.address,
            weight=weight.address,
            bias=bias.address,
            out=out.address,
            control=control.address,
            rows_per_pair=rows_per_pair,
            residual_stride=stride,
            **copies,
            **self._constants,
        )

    def _faults(
        self, arrays: tuple[DeviceArray, ...], num_rows: int, stride: int, copy: Copy | None
    ) -> Iterator[str]:
        x, residual, weight, bias, out, control = arrays
        for name, array in (("x", x), ("residual", residual), ("out", out)):
            yield from rows_faults(name, array, self._dtype, num_rows, self._width)
        yield from array_faults("weight", weight, "float32", (self._width,))
        yield from array_faults("bias", bias, "float32", (self._width,))
        yield from array_faults("control", control, "int64", (2,))
        yield from stride_faults("residual_stride", stride, self._width)
        yield from bounds_faults("rows", num_rows, MOST_SLOTS)
        if (copy is None) != (self._copy is None):
            yield f"copy: got {'none' if copy is None else 'one'}, the kernel writes {self._copy}"
        elif copy is not None and self._copy is not None:
            yield from copy.faults("copy", self._copy, num_rows, self._width)


def _norm_faults(dtype: str, hidden: int, width: int, copy: str | None) -> Iterator[str]:
    yield from choice_faults("dtype", dtype, ACTIVATIONS if copy is None else (WIDE,))
    yield from multiple_faults("hidden", (hidden,), 16)
    yield from bounds_faults("width", width, NORM_COLUMNS[-1])
    yield from multiple_faults("width", (width,), UNIT)
    yield from bounds_faults("hidden", hidden, width)
    if copy is not None:
        yield from choice_faults("copy", copy, list(KINDS))
