"""The products and norms of a layer: which kernel serves each, in 16 and in 8 bits.

Whatever an 8-bit product reads was written in 8 bits by the step before: by `add_norm` beside its
16-bit result, by the product of `ffn1` instead of it, otherwise by `quantize`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import NamedTuple

from ...arrays import DeviceArray
from ...bundle import ATTENTION_OUTPUT, FFN1, FFN2, QKV, SCALES, SMOOTH, layer_path, weight_name
from ...kernels.device.contract import Stream
from ...kernels.launch import KernelLibrary
from ...kernels.layers import AddNorm, Product
from ...kernels.layers8 import Product8, Quantize
from ...kernels.product_norm_call import ProductNorm
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


class Choices(NamedTuple):
    """What serves one GPU: a tile by step in 16 and in 8 bits, and the steps with their norm."""

    tiles: Mapping[str, str]
    tiles8: Mapping[str, str]
    fused: Collection[str]


class Steps:
    """What an engine launches of products and norms, on one GPU."""

    def __init__(
        self,
        library: KernelLibrary,
        plan: Plan,
        weights: Mapping[str, DeviceArray],
        control: DeviceArray,
        num_processors: int,
        choices: Choices,
    ):
        """Load the kernels.

        Args:
            weights: in device memory, as `weights.take_weights` names them.
            control: int64 [2]; says how many pairs a batch has.
            choices: tiles, and what runs in one kernel.

        Raises:
            EngineError: no kernel for this GPU.
        """
        self._plan, self._weights, self._control = plan, weights, control
        gelu = {FFN1: plan.activation}
        product = partial(Product, library, dtype=plan.element, num_processors=num_processors)
        self._products = {
            step: product(gelu=gelu.get(step, "none"), tile=tile)
            for step, tile in choices.tiles.items()
        }
        self._products8 = {
            (step, writes8): Product8(
                library,
                kind=plan.kind,
                gelu=gelu.get(step, "none"),
                tile=choices.tiles8[step],
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
        fused = partial(ProductNorm, library, dtype=plan.element, num_processors=num_processors)
        self._fused = {
            number: fused(epsilon=plan.epsilons[1 + number])
            for number in fused_norms(plan, choices.fused)
        }
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

    def product_and_norm(
        self,
        number: int,
        x: Rows,
        update: DeviceArray,
        residual: DeviceArray,
        out: Rows,
        work: Work,
        residual_stride: int | None = None,
    ) -> None:
        """Write the LayerNorm `number` of its step's product and `residual` to `out`.

        Args:
            number: two a layer, as they come.
            x: what the step reads.
            update: gets the product, where that is a kernel by itself.
            residual_stride: elements from one row to the next of `residual`.
        """
        layer, step = step_before(number)
        if number not in self._fused:
            self.product(layer, step, x, Rows(update), work)
            self.norm(number, update, residual, out, work, residual_stride)
            return
        self._fused[number].enqueue(
            x.exact,
            self.linear(layer_path(layer, step)),
            residual,
            self.linear(_norm_path(number)),
            out.exact,
            self._control,
            residual_stride=residual_stride,
            **work._asdict(),
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
        self._norms[number].enqueue(
            update,
            residual,
            *self.linear(_norm_path(number)),
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


def step_before(number: int) -> tuple[int, str]:
    """Return which step of which layer makes what a LayerNorm adds to its residual."""
    return number // 2, (ATTENTION_OUTPUT, FFN2)[number % 2]


def _norm_path(number: int) -> str:
    return layer_path(number // 2, (ATTENTION_NORM, FFN_NORM)[number % 2])


def fused_norms(plan: Plan, steps: Collection[str]) -> tuple[int, ...]:
    """Return the LayerNorms that run in one kernel with the product of one of `steps`.

    Those are in 16 bits: what they read, and what the next step reads.
    """
    return tuple(
        number
        for number in range(2 * plan.num_layers)
        for layer, step in [step_before(number)]
        if step in steps and not plan.is_quantized(layer, step) and not is_copied(plan, number)
    )


def reader_of(number: int) -> tuple[int, str]:
    """Return which step of which layer reads what a LayerNorm writes."""
    layer, is_last_of_layer = divmod(number, 2)
    return (layer + 1, QKV) if is_last_of_layer else (layer, FFN1)


def is_copied(plan: Plan, number: int) -> bool:
    """Tell whether a LayerNorm writes its result in 8 bits as well."""
    return plan.is_quantized(*reader_of(number))
