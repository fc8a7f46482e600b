"""The steps of an encoder layer and its head as typed calls: check arrays, count programs, launch.

As in `operations`, everything is allocated by the caller at set-up, and a call only queues work on
a stream; arrays must live until it has passed. How many pairs a batch has is no argument: the
kernels read it from `control`, int64 [2] in device memory (where the scores go, how many pairs),
which `Assemble` writes. So one captured graph serves every batch of at most `num_pairs` pairs.

Activations have rows of `width` values: the hidden size rounded up to a multiple of 128. Columns
past the hidden size are 0: the caller pads weights with zeros and clears its memory once. Rows past
the batch hold anything. bfloat16 arrays may be called uint16.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..arrays import DeviceArray
from .attention_call import Attention
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
    stride_faults,
)
from .layer_variants import (
    ACTIVATIONS,
    GELU_FORMS,
    NORM_COLUMNS,
    POINTER_TILES,
    SCORE_PAIRS,
    TMA_TILES,
    UNIT,
    product_name,
    product_tma_name,
    score_name,
)
from .norm_call import AddNorm
from .shallow_call import ShallowScore

__all__ = ["AddNorm", "Attention", "Product", "Score", "ShallowScore"]


class Product:
    """`references.product` on the device: rows times a weight, plus bias, through a GELU.

    Attributes:
        uses_tma: whether the copy engine fetches the tiles.
    """

    def __init__(
        self,
        library: KernelLibrary,
        *,
        dtype: str,
        gelu: str,
        tile: str,
        num_processors: int,
        tma: bool | None = None,
    ):
        """Load the kernel.

        Args:
            dtype: `float16` or `bfloat16`, of rows, weights and results; sums are float32.
            gelu: `none`, `exact` (within 4e-7) or `tanh` (its usual approximation).
            tile: rows, outputs and inputs that a program takes at once: `128x64x64`.
            num_processors: multiprocessors of the GPU.
            tma: whether the copy engine fetches the tiles; None lets it where the GPU has one.

        Raises:
            EngineError: choices that no kernel takes (all at once), or no kernel for this GPU.
        """
        raise_faults("product", _product_faults(dtype, gelu, tile, num_processors, tma))
        by_engine, by_pointer = (
            name(dtype, gelu, tile) for name in (product_tma_name, product_name)
        )
        has_engine = tile in TMA_TILES and library.has(by_engine)
        self.uses_tma = has_engine if tma is None else tma
        self._kernel = library.kernel(by_engine if self.uses_tma else by_pointer)
        self._dtype = dtype
        self._shape = TMA_TILES[tile] if self.uses_tma else POINTER_TILES[tile]
        self._most_programs = num_processors * fitting_programs(self._kernel)

    def enqueue(
        self,
        x: DeviceArray,
        weight: DeviceArray,
        bias: DeviceArray,
        out: DeviceArray,
        control: DeviceArray,
        *,
        num_pairs: int,
        rows_per_pair: int,
        stream: Stream,
        x_stride: int | None = None,
    ) -> None:
        """Write the first rows of `out`, `rows_per_pair` for each pair; returns at once.

        Args:
            x: [at least the rows, I] of the dtype, on 16 bytes; all its rows must be memory.
            weight: [O, I] of the dtype, on 16 bytes; O and I are multiples of 128.
            bias: float32 [O], on 16 bytes.
            out: [at least the rows, O], on 16 bytes, written; rows after those of the batch may be
                written as well.
            control: int64 [2].
            num_pairs: the most pairs that `control` will say.
            rows_per_pair: the slots of a pair, or 1.
            x_stride: elements from one row of `x` to the next, a multiple of 16; None: I. A pair's
                CLS row is one row in `slots * I` elements.

        Raises:
            EngineError: arrays that do not fit (all faults at once).
        """
        (num_out, num_in), num_rows = weight.shape, num_pairs * rows_per_pair
        stride = num_in if x_stride is None else x_stride
        arrays = (x, weight, bias, out, control)
        raise_faults("product", self._faults(arrays, num_rows, stride))
        values: dict[str, float] = {
            "bias": bias.address,
            "control": control.address,
            "rows_per_pair": rows_per_pair,
            "num_out": num_out,
            "num_in": num_in,
        }
        tiles = -(-num_rows // self._shape.rows) * (num_out // self._shape.outputs)
        if self.uses_tma:
            programs = min(tiles, self._most_programs)
            # A tile may reach past the rows: the copy engine fetches none that its map has not.
            rows = (x[:num_rows], stride)
            self._kernel.launch(stream, programs, x=rows, weight=weight, out=out, **values)
            return
        addresses = {"x": x.address, "weight": weight.address, "out": out.address}
        self._kernel.launch(stream, tiles, x_stride=stride, **addresses, **values)

    def _faults(self, arrays: tuple[DeviceArray, ...], num_rows: int, stride: int) -> Iterator[str]:
        x, weight, bias, out, control = arrays
        num_out, num_in = weight.shape
        yield from rows_faults("x", x, self._dtype, num_rows, num_in)
        yield from rows_faults("weight", weight, self._dtype, num_out, num_in)
        yield from array_faults("bias", bias, "float32", (num_out,))
        yield from rows_faults("out", out, self._dtype, num_rows, num_out)
        yield from array_faults("control", control, "int64", (2,))
        yield from multiple_faults("outputs and inputs", (num_out, num_in), UNIT)
        yield from stride_faults("x_stride", stride, num_in)
        yield from bounds_faults("rows", num_rows, MOST_SLOTS)


class Score:
    """`references.score` on the device: CLS rows through pooler and classifier, in float32."""

    def __init__(self, library: KernelLibrary, *, dtype: str, width: int):
        """Load the kernel.

        Args:
            dtype: `float16` or `bfloat16`, of the CLS rows.
            width: values of a row, a multiple of 128.

        Raises:
            EngineError: choices that no kernel takes (all at once), or no kernel for this GPU.
        """
        raise_faults("score", _score_faults(dtype, width))
        self._kernel = library.kernel(score_name(dtype))
        self._dtype, self._width = dtype, width

    def enqueue(
        self,
        cls: DeviceArray,
        pooler_weight: DeviceArray,
        pooler_bias: DeviceArray,
        classifier_weight: DeviceArray,
        classifier_bias: DeviceArray,
        control: DeviceArray,
        *,
        num_pairs: int,
        stream: Stream,
    ) -> None:
        """Write a float32 score of each pair where `control` says; returns at once.

        Args:
            cls: [at least the pairs, width] of the dtype, on 16 bytes.
            pooler_weight: float32 [width, width], outputs first, on 16 bytes.
            pooler_bias, classifier_weight: float32 [width], on 16 bytes.
            classifier_bias: float32 [1].
            control: int64 [2].
            num_pairs: the most pairs that `control` will say.

        Raises:
            EngineError: arrays that do not fit (all faults at once).
        """
        weights = {
            "pooler_weight": pooler_weight,
            "pooler_bias": pooler_bias,
            "classifier_weight": classifier_weight,
            "classifier_bias": classifier_bias,
        }
        raise_faults("score", self._faults(cls, weights, control, num_pairs))
        self._kernel.launch(
            stream,
            -(-num_pairs // SCORE_PAIRS),
            cls=cls.address,
            control=control.address,
            width=self._width,
            **{name: array.address for name, array in weights.items()},
        )

    def _faults(
        self, cls: DeviceArray, weights: dict[str, DeviceArray], control: DeviceArray, pairs: int
    ) -> Iterator[str]:
        width = self._width
        yield from rows_faults("cls", cls, self._dtype, pairs, width)
        shapes = ((width, width), (width,), (width,), (1,))
        for (name, array), shape in zip(weights.items(), shapes, strict=True):
            yield from array_faults(name, array, "float32", shape)
        yield from array_faults("control", control, "int64", (2,))
        yield from bounds_faults("pairs", pairs, MOST_SLOTS // width)


def _product_faults(
    dtype: str, gelu: str, tile: str, num_processors: int, tma: bool | None
) -> Iterator[str]:
    tiles = {True: TMA_TILES, False: POINTER_TILES, None: {**POINTER_TILES, **TMA_TILES}}[tma]
    yield from choice_faults("dtype", dtype, ACTIVATIONS)
    yield from choice_faults("gelu", gelu, list(GELU_FORMS))
    yield from choice_faults("tile", tile, list(tiles))
    yield from bounds_faults("num_processors", num_processors, 2**16)


def _score_faults(dtype: str, width: int) -> Iterator[str]:
    yield from choice_faults("dtype", dtype, ACTIVATIONS)
    yield from multiple_faults("width", (width,), UNIT)
    yield from bounds_faults("width", width, NORM_COLUMNS[-1])
