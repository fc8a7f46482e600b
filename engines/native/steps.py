"""The products and norms of a layer: which kernel serves each, in 16 and in 8 bits.

Whatever an 8-bit product reads was written in 8 bits by the step before: by `add_norm` beside its
16-bit result, by the product of `ffn1` instead of it, otherwise by `quantize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ...arrays import DeviceArray
from ...bundle import FFN1, FFN2, QKV, SCALES, SMOOTH, layer_path, weight_name
from ...kernels.device.contract import Stream
from ...kernels.launch import KernelLibrary
from ...kernels.layers import AddNorm, Product
from ...kernels.layers8 import Product8, Quantize
from ...kernels.scaled import Copy, Scaled
from .memory import Rows
from .plan import STEPS8, Plan
from .weights import ATTENTION_NORM, FFN_NORM

WHOLE = slice(None)


class Work(NamedTuple):
    """Which rows a step works on: `rows_per_pair` of each of at most `num_pairs` pairs."""

    num_pairs: int
    rows_per_pair: int
    stream: Stream


class Steps:
    """What an engine launches of products and norms, on one GPU."""

    def __init__(
        self,
        library: KernelLibrary,
        plan: Plan,
        weights: Mapping[str, DeviceArray],
        control: DeviceArray,
        num_processors: int,
        tiles: tuple[Mapping[str, str], Mapping[str, str]],
    ):
        """Load the kernels.

        Args:
            weights: in device memory, as `weights.take_weights` names them.
            control: int64 [2]; says how many pairs a batch has.
            tiles: step of a layer -> tile of its product, in 16 and in 8 bits.

        Raises:
            EngineError: no kernel for this GPU.
        """
        self._plan, self._weights, self._control = plan, weights, control
        sixteen, eight = tiles
        gelu = {FFN1: plan.activation}
        self._products = {
            step: Product(
                library,
                dtype=plan.element,
                gelu=gelu.get(step, "none"),
                tile=tile,
                num_processors=num_processors,
            )
            for step, tile in sixteen.items()
        }
        self._products8 = {
            (step, writes8): Product8(
                library,
                kind=plan.kind,
                gelu=gelu.get(step, "none"),
                tile=eight[step],
                num_processors=num_processors,
                writes8=writes8,
            )
            for step, writes8 in forms8(plan)
        }
        sizes = {"hidden": plan.hidden, "width": plan.width}
        self._norms = [
            AddNorm(
                library,
                dtype=plan.element,
                epsilon=epsilon,
                copy=plan.kind if is_copied(plan, number) else None,
                **sizes,
            )
            for number, epsilon in enumerate(plan.epsilons[1:])
        ]
        self._quantizers = {
            width: Quantize(library, kind=plan.kind, width=width)
            for width in (plan.width, plan.wide)
            if plan.quantized
        }

    def product(
        self,
        layer: int,
        step: str,
        x: Rows,
        out: Rows,
        work: Work,
        *,
        part: slice = WHOLE,
        row_step: int = 1,
    ) -> None:
        """Write a step's product to `out`: in 8 bits, where only an 8-bit product reads it.

        Args:
            part: which of its outputs.
            row_step: each `row_step`-th row of `x` is read.
        """
        path = layer_path(layer, step)
        weight, bias = (each[part] for each in self.linear(path))
        plan, common = self._plan, work._asdict()
        if not plan.is_quantized(layer, step):
            stride = None if row_step == 1 else row_step * weight.shape[1]
            arrays = x.exact, weight, bias, out.exact, self._control
            self._products[step].enqueue(*arrays, x_stride=stride, **common)
            if step == FFN1:
                self.quantize(layer, FFN2, out, work)
            return
        assert x.scaled is not None
        scaled = Scaled(weight, self._weights[weight_name(path, SCALES)][part])
        writes8 = step == FFN1 and plan.is_quantized(layer, FFN2)
        target = self._copy(layer, FFN2, out) if writes8 else out.exact
        assert target is not None
        self._products8[step, writes8].enqueue(
            x.scaled, scaled, bias, target, self._control, row_step=row_step, **common
        )

    def norm(
        self,
        number: int,
        update: DeviceArray,
        residual: DeviceArray,
        out: Rows,
        work: Work,
        residual_stride: int | None = None,
    ) -> None:
        """Write the LayerNorm `number` of `update + residual` to `out`, as the next step reads it.

        Args:
            number: two a layer, as they come.
            residual_stride: elements from one row to the next of `residual`.
        """
        layer, part = number // 2, (ATTENTION_NORM, FFN_NORM)[number % 2]
        self._norms[number].enqueue(
            update,
            residual,
            *self.linear(layer_path(layer, part)),
            out.exact,
            self._control,
            residual_stride=residual_stride,
            copy=self._copy(*reader_of(number), out),
            **work._asdict(),
        )

    def quantize(self, layer: int, step: str, rows: Rows, work: Work) -> None:
        """Write `rows` in 8 bits where that step of the layer reads those."""
        copy = self._copy(layer, step, rows)
        if copy is not None:
            quantizer = self._quantizers[rows.exact.shape[1]]
            quantizer.enqueue(rows.exact, copy, self._control, **work._asdict())

    def linear(self, path: str) -> tuple[DeviceArray, DeviceArray]:
        """Return weight and bias of what is at `path`."""
        return self._weights[weight_name(path)], self._weights[weight_name(path, "bias")]

    def _copy(self, layer: int, step: str, rows: Rows) -> Copy | None:
        """Return where `rows` go in 8 bits for that step of the layer; None: it reads none."""
        if rows.scaled is None or not self._plan.is_quantized(layer, step):
            return None
        return Copy(rows.scaled, self._weights[weight_name(layer_path(layer, step), SMOOTH)])


def forms8(plan: Plan) -> set[tuple[str, bool]]:
    """Return the 8-bit products that a plan needs: step, and whether results are 8 bit again."""
    return {
        (step, step == FFN1 and plan.is_quantized(layer, FFN2))
        for layer in range(plan.num_layers)
        for step in STEPS8
        if plan.is_quantized(layer, step)
    }


def reader_of(number: int) -> tuple[int, str]:
    """Return which step of which layer reads what a LayerNorm writes."""
    layer, is_last_of_layer = divmod(number, 2)
    return (layer + 1, QKV) if is_last_of_layer else (layer, FFN1)


def is_copied(plan: Plan, number: int) -> bool:
    """Tell whether a LayerNorm writes its result in 8 bits as well."""
    return plan.is_quantized(*reader_of(number))
