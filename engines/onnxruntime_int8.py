"""int8 graphs as ONNX Runtime's x86 kernels read them: unsigned activations, sums that fit.

They multiply unsigned by signed bytes. Without VNNI they add two such products in 16 bits: up to
2 * 255 * 127, where 32,767 fit, and what is too much is cut off unnoticed. Weights of 7 bits (63 at
most) stay below; larger ones are refused for such a CPU.

ONNX Runtime makes signed activations unsigned itself, but where several products read one value
(query, key and value) it gives up and multiplies in float32. Full size, 16 pairs, one core with
AVX512_VNNI: 167 ms as it comes, 110 with what is done here (1.32.0).

Scales found while running (`precision/dynamic.py`) become integer products, too, where one covers
a whole row: the row is divided by its scale and rounded, and its sums are multiplied by it again.
Scores of both forms differ by float32's rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..arrays import Array
from ..bundle import DEQUANTIZED, DYNAMIC, QUANTIZED, SCALES, node_name, path_of_node, value_name
from ..errors import EngineError
from .cpu import weights_fit_16_bits

if TYPE_CHECKING:
    import onnx

ZERO_POINT = 128
LARGEST, LEAST = 127.0, 1e-30  # as the pass has them
_DOMAIN = "com.microsoft"


def write_for_x86(graph: Path, out: Path, *, has_vnni: bool) -> None:
    """Write the int8 graph at `graph` to `out` in the form for x86.

    Args:
        has_vnni: whether the CPU adds int8 products in 32 bits.

    Raises:
        EngineError: weights whose sums overflow there, or scales found while running that cover
            only a part of a row.
    """
    import onnx

    model = onnx.load(graph)
    _Fitter(model, has_vnni).run()
    onnx.save(model, out)


class _Fitter:
    """Changes one model in place."""

    def __init__(self, model: onnx.ModelProto, has_vnni: bool):
        self._model, self._has_vnni = model, has_vnni
        self._weights = {weight.name: weight for weight in model.graph.initializer}
        self._rows: dict[str, tuple[str, str]] = {}  # by value: its bytes, and their scales

    def run(self) -> None:
        from onnx import helper

        graph = self._model.graph
        for item in graph.node:
            if item.op_type == "QuantizeLinear":
                zeros = self._array(item.input[2])
                self._set(item.input[2], np.full(zeros.shape, ZERO_POINT, np.uint8))
            elif item.op_type == "DequantizeLinear" and item.input[0] in self._weights:
                self._check_weight(item.input[0])
        nodes = [new for item in graph.node for new in self._fitted(item)]
        read = {name for item in nodes for name in item.input}
        weights = [weight for name, weight in self._weights.items() if name in read]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(weights)
        self._model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))

    def _check_weight(self, name: str) -> None:
        """Refuse a weight whose sums would not fit."""
        values = self._array(name)
        if values.dtype == np.int8 and not (self._has_vnni or weights_fit_16_bits(values)):
            raise EngineError(
                f"{name} holds {np.abs(values.astype(np.int16)).max()}, and sums of its products "
                "overflow on a CPU without VNNI",
                hint="weights of 7 bits, 63 at most, do not",
            )

    def _fitted(self, item: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """Yield what takes a node's place: nothing for what a dynamic pass added."""
        if item.op_type == "MatMul" and item.input[0].endswith(f".{DYNAMIC}"):
            path = f"{path_of_node(item.name)}/{DYNAMIC}"
            value = item.input[0].removesuffix(f".{DYNAMIC}")
            if value not in self._rows:
                yield from self._quantized(value, path)
            yield from self._product(item, path, *self._rows[value])
        elif f"/{DYNAMIC}/" not in item.name:
            yield item

    def _quantized(self, value: str, path: str) -> list[onnx.NodeProto]:
        """Return what makes bytes of `value` [..., K], with a scale for every row."""
        last, one = np.array([-1], np.int64), np.float32(1)
        size = self._node("Abs", path, [value])
        most = self._node("ReduceMax", path, [size.output[0], self._constant("last", last)])
        least, largest = (self._constant(*each) for each in (("least", LEAST), ("most", LARGEST)))
        some = self._node("Max", path, [most.output[0], least])
        scale = self._node("Div", f"{path}/scale", [some.output[0], largest])
        scaled = self._node("Div", path, [value, scale.output[0]])
        step, middle = self._constant("one", one), self._zero_point()
        rows = self._node("QuantizeLinear", path, [scaled.output[0], step, middle])
        self._rows[value] = rows.output[0], scale.output[0]
        return [size, most, some, scale, scaled, rows]

    def _product(
        self, item: onnx.NodeProto, path: str, rows: str, scale: str
    ) -> list[onnx.NodeProto]:
        """Return the integer product of bytes and a weight, and its scaling."""
        name = item.input[1].removesuffix(f".{DEQUANTIZED}")
        stored, scales, zeros = (f"{name}.{end}" for end in (QUANTIZED, SCALES, "zero_point"))
        by_output = self._array(scales)
        if len(by_output) > 1:
            raise EngineError(
                f"{scales} has {len(by_output)} scales for a row, this form of int8 has one"
            )
        flat, one = f"{scales}.of_rows", self._constant("one", np.float32(1))
        self._set(flat, by_output[0])
        self._set(zeros, np.zeros(by_output.shape[1], np.int8))
        self._check_weight(stored)
        inputs = [rows, stored, one, flat, self._zero_point(), zeros]
        product = self._node("MatMulIntegerToFloat", path, inputs, domain=_DOMAIN)
        product.name = item.name
        scaled = self._node("Mul", path, [product.output[0], scale])
        scaled.output[0] = item.output[0]
        return [product, scaled]

    def _node(self, kind: str, path: str, inputs: list[str], **attributes: Any) -> onnx.NodeProto:
        from onnx import helper

        output = value_name(path, kind)
        return helper.make_node(kind, inputs, [output], node_name(path, kind), **attributes)

    def _array(self, name: str) -> Array:
        from onnx import numpy_helper

        return numpy_helper.to_array(self._weights[name])

    def _set(self, name: str, values: Array) -> None:
        from onnx import numpy_helper

        self._weights[name] = numpy_helper.from_array(values, name)

    def _constant(self, name: str, value: npt.ArrayLike) -> str:
        values = np.asarray(value)
        key = f"const.x86.{name}"
        self._set(key, values.astype(np.float32) if values.dtype == np.float64 else values)
        return key

    def _zero_point(self) -> str:
        return self._constant("zero_point", np.uint8(ZERO_POINT))
