"""Run a strongly typed graph on any CPU: float32 arithmetic, rounded wherever the graph rounds.

What a GPU engine computes lies near it: it rounds no more often, and sums in float32 as well. It
tells what a precision does to the scores where no device is at hand; it tells nothing of speed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...arrays import Float32
from ...bundle import DEQUANTIZED, OUTPUT
from ...errors import EngineError
from ..contract import Batch
from ..cpu import weights_fit_16_bits, why_no_vnni
from ..forwards import Run, forwards, open_session
from .float8 import round_to_float8
from .graph import Graph, node, with_inputs
from .lower import ONNX_TYPES
from .static import find_linears

if TYPE_CHECKING:
    import onnx


_FLOAT32 = ONNX_TYPES["float32"]
_INT8, _FLOAT8 = 3, 17
_LOW = (ONNX_TYPES["float16"], ONNX_TYPES["bfloat16"])
_MOST_SHAPE_VALUES = 64  # of a weight that says how a value is reshaped, cut or gathered
# They move values and never round.
_MOVES = ("Reshape", "Transpose", "Gather", "Split", "Squeeze", "Unsqueeze", "Concat")


def emulated(graph: Graph, *, fold_int8: bool = False) -> Graph:
    """Return a float32 graph that rounds every 16-bit and 8-bit value as `graph` does.

    `fold_int8` also stores int8 weights in float32: for graphs whose products cannot run in int8.
    """
    types = _value_types(graph)
    new = graph.replaced([])
    for item in graph.nodes:
        low = types.get(item.output[0], 0)
        plain = _in_float32(new, item)
        if item.op_type == "DequantizeLinear" and _is_folded(graph, item, fold_int8):
            _fold(new, item)
        elif low == _FLOAT8:
            new.nodes += round_to_float8(new, plain)
        elif item.op_type == "DequantizeLinear" and types.get(item.input[0]) == _FLOAT8:
            product = node("Mul", list(plain.input[:2]), plain.output[0], plain.name)
            new.nodes += _maybe_rounding(product, low)
        elif item.op_type in _MOVES:
            new.nodes.append(plain)
        else:
            new.nodes += _maybe_rounding(plain, low)
    return new


def runner(graph: Graph, values: Sequence[str] = (OUTPUT,)) -> Run:
    """Open an emulated or float32 graph in ONNX Runtime; return what runs a batch.

    What it returns gives `values` (float32 values of the graph) of one batch, in their order.

    Raises:
        EngineError: onnxruntime is missing or refuses the graph.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EngineError(
            f"scoring a graph on the CPU needs ONNX Runtime, which is missing: {error}",
            hint="pip install 'edje-runtime[cpu]'",
        ) from error
    extra = [value for value in values if value not in graph.outputs]
    content = graph.model(extra).SerializeToString()
    try:
        session = open_session(content, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
    except Exception as error:  # ORT's exception classes share no base of their own
        raise EngineError(f"ONNX Runtime cannot run the graph: {error}") from error
    return forwards(session, values)


def scorer(graph: Graph) -> Callable[[Batch], Float32]:
    """Return a function that scores batches as `graph`, of any types, would.

    In float32 where int8 sums would overflow on this CPU: that is no fault of the graph.
    """
    run = runner(emulated(graph, fold_int8=why_no_vnni() is not None and not _fits(graph)))
    return lambda batch: run(batch)[0]


def _fits(graph: Graph) -> bool:
    """Tell whether all int8 weights are so small that their sums overflow nowhere."""
    stored = {item.input[0] for item in graph.nodes if item.op_type == "DequantizeLinear"}
    weights = (graph.weights[name] for name in stored if name in graph.weights)
    names = (weight.name for weight in weights if weight.data_type == _INT8)
    return all(weights_fit_16_bits(graph.array(name)) for name in names)


def _value_types(graph: Graph) -> dict[str, int]:
    """Return the element type of every value that a node makes."""
    from onnx import helper, shape_inference

    # Of large weights only the type and the shape matter: their values need not be copied twice.
    light = graph.replaced(graph.nodes)
    for name, weight in graph.weights.items():
        if np.prod(weight.dims) > _MOST_SHAPE_VALUES:
            del light.weights[name]
            light.inputs.append(helper.make_tensor_value_info(name, weight.data_type, weight.dims))
    model = shape_inference.infer_shapes(light.model(), check_type=True, strict_mode=True)
    values = [*model.graph.value_info, *model.graph.output]
    return {value.name: value.type.tensor_type.elem_type for value in values}


def _in_float32(graph: Graph, item: onnx.NodeProto) -> onnx.NodeProto:
    """Return the node with float32 weights for its 16-bit ones, and casts only to float32."""
    new = with_inputs(item, [_float32_weight(graph, name) for name in item.input])
    if item.op_type == "Cast":
        for attribute in new.attribute:
            if attribute.name == "to" and attribute.i in _LOW:
                attribute.i = _FLOAT32
    return new


def _float32_weight(graph: Graph, name: str) -> str:
    if name not in graph.weights or graph.weights[name].data_type not in _LOW:
        return name
    key = f"{name}.as_float32"
    if key not in graph.weights:
        graph.set_weight(key, graph.array(name).astype(np.float32))
    return key


def _maybe_rounding(item: onnx.NodeProto, low: int) -> list[onnx.NodeProto]:
    """Return `item`, and the casts that round its output to the type `low` and back."""
    if low not in _LOW:
        return [item]
    output = item.output[0]
    exact, rounded = f"{output}.exact", f"{output}.rounded"
    item.output[0] = exact
    path = output.removesuffix("_output")
    return [
        item,
        node("Cast", [exact], rounded, f"{path}/round", to=low),
        node("Cast", [rounded], output, f"{path}/back", to=_FLOAT32),
    ]


def _is_folded(graph: Graph, item: onnx.NodeProto, fold_int8: bool) -> bool:
    """Tell whether to dequantise a weight now: ONNX Runtime would at every run.

    Not int8 weights with float32 scales: it has integer kernels for those.
    """
    stored, scale = (graph.weights.get(name) for name in item.input[:2])
    if stored is None or scale is None:
        return False
    return bool(fold_int8 or stored.data_type == _FLOAT8 or scale.data_type != _FLOAT32)


def _fold(graph: Graph, item: onnx.NodeProto) -> None:
    """Store the dequantised weight under the node's output, rounded to the scale's type."""
    stored, scale = (graph.array(name) for name in item.input[:2])
    values = stored.astype(np.float32) * scale.astype(np.float32)
    graph.set_weight(item.output[0], values.astype(scale.dtype).astype(np.float32))


FLAGS = "quantized"


class Switches:
    """Scores batches with any set of layer groups quantised, in float32 otherwise."""

    def __init__(self, graph: Graph, quantized: Graph):
        """Open `graph`, float32, and what a pass made of it that quantised all it may."""
        stored = _quantized_weights(quantized)
        linears = [linear for linear in find_linears(graph) if linear.weight in stored]
        self.groups = list(dict.fromkeys(linear.group for linear in linears))
        self._run = runner(emulated(switched(graph, quantized, self.groups), fold_int8=True))

    def score(self, batch: Batch, quantized: Collection[str]) -> Float32:
        """Return the scores with the layer groups `quantized` quantised: float32 [P]."""
        flags = np.array([group in quantized for group in self.groups])
        scores: Float32 = self._run(batch, {FLAGS: flags})[0]
        return scores


def switched(graph: Graph, full: Graph, groups: Sequence[str]) -> Graph:
    """Return `full` with an input `quantized`, bool [groups]: which are quantised, as it is.

    The others read the values and weights of `graph`.
    """
    from onnx import TensorProto, helper

    new = full.replaced([])
    flags = helper.make_tensor_value_info(FLAGS, TensorProto.BOOL, [len(groups)])
    new.inputs = [*full.inputs, flags]
    for number, group in enumerate(groups):
        index = new.set_weight(f"{FLAGS}.{number}", np.array(number, np.int64))
        new.nodes.append(node("Gather", [FLAGS, index], group, f"/{FLAGS}/{group}", axis=0))
    by_output = {f"{linear.weight}.{DEQUANTIZED}": linear for linear in find_linears(graph)}
    for item in full.nodes:
        linear = by_output.get(item.input[1]) if item.op_type == "MatMul" else None
        if linear is None:
            new.nodes.append(item)
            continue
        chosen = []
        for quantized, exact in zip(item.input, (linear.value, linear.weight), strict=True):
            output = f"{linear.name}.{exact}.chosen"
            inputs = [linear.group, quantized, exact]
            new.nodes.append(node("Where", inputs, output, f"{item.name}/{exact}/Where"))
            chosen.append(output)
        new.nodes.append(with_inputs(item, chosen))
    return new


def _quantized_weights(graph: Graph) -> set[str]:
    """Return the weights whose products read them dequantised."""
    read = {item.input[1] for item in graph.nodes if item.op_type == "MatMul"}
    end = f".{DEQUANTIZED}"
    return {name.removesuffix(end) for name in read if name.endswith(end)}
