"""Products of 8-bit rows and what makes rows 8 bit, as typed calls: check arrays, launch.

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
    fitting_programs,
    multiple_faults,
    raise_faults,
    rows_faults,
)
from .layer_variants import GELU_FORMS, UNIT
from .layer_variants8 import (
    KINDS,
    POINTER_TILES8,
    QUANTIZE_ROWS,
    TMA_TILES8,
    WIDE,
    product8_name,
    product8_tma_name,
    quantize_name,
)
from .scaled import Copy, Scaled


class Product8:
    """`references.product8` on the device: 8-bit rows times an 8-bit weight.

    Attributes:
        uses_tma: whether the copy engine fetches the tiles.
    """

    def __init__(
        self,
        library: KernelLibrary,
        *,
        kind: str,
        gelu: str,
        tile: str,
        num_processors: int,
        writes8: bool = False,
        tma: bool | None = None,
    ):
        """Load the kernel.

        Args:
            kind: `int8` or `fp8`, of rows and weight.
            gelu: `none`, `exact` (within 2e-7) or `tanh` (its usual approximation).
            tile: rows, outputs and inputs that a program takes at once: `64x128x128`.
            num_processors: multiprocessors of the GPU.
            writes8: whether results are 8 bit again, else float16; only behind a GELU.
            tma: whether the copy engine fetches the tiles; None lets it where the GPU has one.

        Raises:
            EngineError: choices that no kernel takes (all at once), or no kernel for this GPU.
        """
        raise_faults("product8", _product_faults(kind, gelu, tile, num_processors, writes8))
        out = kind if writes8 else WIDE
        by_engine, by_pointer = (
            name(kind, gelu, out, tile) for name in (product8_tma_name, product8_name)
        )
        self.uses_tma = library.has(by_engine) if tma is None else tma
        self._kernel = library.kernel(by_engine if self.uses_tma else by_pointer)
        self._kind, self._writes8 = kind, writes8
        self._shape = (TMA_TILES8 if self.uses_tma else POINTER_TILES8)[tile]
        self._most_programs = num_processors * fitting_programs(self._kernel)

    def enqueue(
        self,
        x: Scaled,
        weight: Scaled,
        bias: DeviceArray,
        out: DeviceArray | Copy,
        control: DeviceArray,
        *,
        num_pairs: int,
        rows_per_pair: int,
        stream: Stream,
        row_step: int = 1,
    ) -> None:
        """Write the first rows of `out`, `rows_per_pair` for each pair; returns at once.

        Args:
            x: at least `row_step` times the rows, I columns; all its rows must be memory.
            weight: O rows of I columns; O and I are multiples of 128.
            bias: float32 [O], on 16 bytes.
            out: float16 [at least the rows, O], on 16 bytes, or where 8 bits go; written; rows
                after those of the batch may be written as well.
            control: int64 [2].
            num_pairs: the most pairs that `control` will say.
            rows_per_pair: the slots of a pair, or 1.
            row_step: each `row_step`-th row of `x` is read: a pair's CLS row is one in its slots.

        Raises:
            EngineError: arrays that do not fit (all faults at once).
        """
        (num_out, num_in), num_rows = weight.values.shape, num_pairs * rows_per_pair
        arrays = (x, weight, bias, out, control)
        raise_faults("product8", self._faults(*arrays, num_rows, row_step))
        values: dict[str, float] = {
            "x_scales": x.scales.address,
            "weight_scales": weight.scales.address,
            "bias": bias.address,
            "control": control.address,
            "rows_per_pair": rows_per_pair,
            "scales_stride": row_step * (num_in // UNIT),
            "num_out": num_out,
            "num_in": num_in,
        }
        target = out
        if isinstance(out, Copy):
            target = out.rows.values
            values |= {"smooth": out.smooth.address, "out_scales": out.rows.scales.address}
        assert isinstance(target, DeviceArray)
        stride = row_step * num_in
        tiles = -(-num_rows // self._shape.rows) * (num_out // self._shape.outputs)
        if self.uses_tma:
            # The rows that are read, as an array of their own.
            read = DeviceArray(x.values.address, (num_rows, num_in), x.values.dtype)
            programs = min(tiles, self._most_programs)
            rows = {"weight": weight.values, "out": target}
            self._kernel.launch(stream, programs, x=(read, stride), **rows, **values)
            return
        values |= {"x": x.values.address, "weight": weight.values.address, "out": target.address}
        self._kernel.launch(stream, tiles, x_stride=stride, **values)

    def _faults(
        self,
        x: Scaled,
        weight: Scaled,
        bias: DeviceArray,
        out: DeviceArray | Copy,
        control: DeviceArray,
        num_rows: int,
        row_step: int,
    ) -> Iterator[str]:
        num_out, num_in = weight.values.shape
        yield from x.faults("x", self._kind, (num_rows - 1) * row_step + 1, num_in)
        yield from weight.faults("weight", self._kind, num_out, num_in)
        yield from array_faults("bias", bias, "float32", (num_out,))
        if isinstance(out, Copy) != self._writes8:
            yield f"out: the kernel writes {self._kind if self._writes8 else WIDE}"
        elif isinstance(out, Copy):
            yield from out.faults("out", self._kind, num_rows, num_out)
        else:
            yield from rows_faults("out", out, WIDE, num_rows, num_out)
        yield from array_faults("control", control, "int64", (2,))
        yield from multiple_faults("outputs and inputs", (num_out, num_in), UNIT)
        yield from bounds_faults("rows", num_rows * row_step, MOST_SLOTS)


class Quantize:
    """`references.quantize` on the device: float16 rows in 8 bits, with their scales."""

    def __init__(self, library: KernelLibrary, *, kind: str, width: int):
        """Load the kernel.

        Args:
            kind: `int8` or `fp8`, of the results.
            width: values of a row, a multiple of 128.

        Raises:
            EngineError: choices that no kernel takes (all at once), or no kernel for this GPU.
        """
        raise_faults("quantize", _quantize_faults(kind, width))
        self._kernel = library.kernel(quantize_name(kind))
        self._kind, self._width = kind, width

    def enqueue(
        self,
        x: DeviceArray,
        out: Copy,
        control: DeviceArray,
        *,
        num_pairs: int,
        rows_per_pair: int,
        stream: Stream,
    ) -> None:
        """Write the first rows of `out`, `rows_per_pair` for each pair; returns at once.

        Args:
            x: float16 [at least the rows, width], on 16 bytes.
            out: where 8 bits go; written.
            control: int64 [2].
            num_pairs: the most pairs that `control` will say.
            rows_per_pair: the slots of a pair, or 1.

        Raises:
            EngineError: arrays that do not fit (all faults at once).
        """
        num_rows = num_pairs * rows_per_pair
        raise_faults("quantize", self._faults(x, out, control, num_rows))
        self._kernel.launch(
            stream,
            -(-num_rows // QUANTIZE_ROWS) * (self._width // UNIT),
            x=x.address,
            smooth=out.smooth.address,
            out=out.rows.values.address,
            scales=out.rows.scales.address,
            control=control.address,
            rows_per_pair=rows_per_pair,
            width=self._width,
        )

    def _faults(
        self, x: DeviceArray, out: Copy, control: DeviceArray, num_rows: int
    ) -> Iterator[str]:
        yield from rows_faults("x", x, WIDE, num_rows, self._width)
        yield from out.faults("out", self._kind, num_rows, self._width)
        yield from array_faults("control", control, "int64", (2,))
        yield from bounds_faults("rows", num_rows, MOST_SLOTS)


def _product_faults(
    kind: str, gelu: str, tile: str, num_processors: int, writes8: bool
) -> Iterator[str]:
    yield from choice_faults("kind", kind, list(KINDS))
    yield from choice_faults("gelu", gelu, list(GELU_FORMS))
    known = {**POINTER_TILES8, **TMA_TILES8}
    yield from choice_faults("tile", tile, [name for name in known if known[name].takes(gelu)])
    yield from bounds_faults("num_processors", num_processors, 2**16)
    if writes8 and gelu == "none":
        yield "writes8: got True, a product without GELU has float16 results"


def _quantize_faults(kind: str, width: int) -> Iterator[str]:
    yield from choice_faults("kind", kind, list(KINDS))
    yield from multiple_faults("width", (width,), UNIT)
