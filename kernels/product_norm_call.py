"""A product with residual and LayerNorm behind it as a typed call: checks, launch.

As in `layers`, whose rules hold here.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..arrays import DeviceArray
from .cuda_variants import BLOCK_IN, COLUMNS, ROWS, product_norm_name
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
from .layer_variants import ACTIVATIONS


class ProductNorm:
    """`layer_references.product` through `add_norm` in one kernel, for rows of 384 values.

    The product is not rounded before the residual is added. A row is the same bits in every batch.
    """

    def __init__(self, library: KernelLibrary, *, dtype: str, epsilon: float, num_processors: int):
        """Load the kernel.

        Args:
            dtype: `float16` or `bfloat16`, of rows, weights and results; sums are float32.
            epsilon: of the LayerNorm.
            num_processors: multiprocessors of the GPU.

        Raises:
            EngineError: choices that the kernel does not take (all at once), or none for this GPU.
        """
        raise_faults("product_norm", _faults(dtype, num_processors))
        self._kernel = library.kernel(product_norm_name(dtype))
        self._dtype, self._epsilon, self._most_programs = dtype, epsilon, num_processors

    def enqueue(
        self,
        x: DeviceArray,
        linear: tuple[DeviceArray, DeviceArray],
        residual: DeviceArray,
        norm: tuple[DeviceArray, DeviceArray],
        out: DeviceArray,
        control: DeviceArray,
        *,
        num_pairs: int,
        rows_per_pair: int,
        stream: Stream,
        residual_stride: int | None = None,
    ) -> None:
        """Write the first rows of `out`, `rows_per_pair` for each pair; returns at once.

        Args:
            x: [at least the rows, I] of the dtype, on 16 bytes; I is a multiple of 64.
            linear: the product's weight, [384, I] of the dtype, on 16 bytes; its bias, float32
                [384].
            residual: [at least the rows, 384] of the dtype, on 16 bytes.
            norm: weight and bias of the LayerNorm, float32 [384] each.
            out: [at least the rows, 384], on 16 bytes, written; it may be `residual` without a
                stride of its own.
            control: int64 [2].
            num_pairs: the most pairs that `control` will say.
            rows_per_pair: the slots of a pair, or 1.
            residual_stride: elements from one row of `residual` to the next, a multiple of 16;
                None: 384.

        Raises:
            EngineError: arrays that do not fit (all faults at once).
        """
        stride = COLUMNS if residual_stride is None else residual_stride
        num_rows = num_pairs * rows_per_pair
        arrays = (x, *linear, residual, *norm, out, control)
        raise_faults("product_norm", self._array_faults(arrays, num_rows, stride))
        (weight, bias), (norm_weight, norm_bias) = linear, norm
        self._kernel.launch(
            stream,
            min(-(-num_rows // ROWS), self._most_programs),
            # A tile may reach past the rows: the copy engine fetches none that its map has not.
            x=x[:num_rows],
            weight=weight,
            residual=(residual[:num_rows], stride),
            bias=bias.address,
            norm_weight=norm_weight.address,
            norm_bias=norm_bias.address,
            out=out.address,
            control=control.address,
            rows_per_pair=rows_per_pair,
            num_in=weight.shape[1],
            epsilon=self._epsilon,
        )

    def _array_faults(
        self, arrays: tuple[DeviceArray, ...], num_rows: int, stride: int
    ) -> Iterator[str]:
        x, weight, bias, residual, norm_weight, norm_bias, out, control = arrays
        num_in, vectors = weight.shape[-1], {"norm_weight": norm_weight, "norm_bias": norm_bias}
        yield from rows_faults("x", x, self._dtype, num_rows, num_in)
        yield from array_faults("weight", weight, self._dtype, (COLUMNS, num_in))
        for name, rows in (("residual", residual), ("out", out)):
            yield from rows_faults(name, rows, self._dtype, num_rows, COLUMNS)
        for name, vector in {"bias": bias, **vectors}.items():
            yield from array_faults(name, vector, "float32", (COLUMNS,))
        yield from array_faults("control", control, "int64", (2,))
        yield from multiple_faults("inputs", (num_in,), BLOCK_IN)
        yield from stride_faults("residual_stride", stride, COLUMNS)
        yield from bounds_faults("rows", num_rows, MOST_SLOTS)


def _faults(dtype: str, num_processors: int) -> Iterator[str]:
    yield from choice_faults("dtype", dtype, ACTIVATIONS)
    yield from bounds_faults("num_processors", num_processors, 2**16)
