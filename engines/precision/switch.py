"""One graph in which every place can be quantised or not at run time: a search opens it once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..contract import Batch, Float32
from .emulate import emulated, runner
from .graph import Graph, node, with_inputs
from .quantize import find_linears, quantize

FLAGS = "quantized"


class Switches:
    """Scores batches with any set of places quantised, in float32 otherwise."""

    def __init__(self, graph: Graph, precision: str, amax: Mapping[str, float]):
        """Open the graph; `amax` holds for every linear's input, as in `quantize`."""
        self.places = list(dict.fromkeys(linear.place for linear in find_linears(graph)))
        self._run = runner(emulated(switched(graph, precision, amax, self.places), fold_int8=True))

    def score(self, batch: Batch, quantized: Collection[str]) -> Float32:
        """Return the scores with the places `quantized` quantised: float32 [P]."""
        flags = np.array([place in quantized for place in self.places])
        scores: Float32 = self._run(batch, {FLAGS: flags})[0]
        return scores


def switched(
    graph: Graph, precision: str, amax: Mapping[str, float], places: Sequence[str]
) -> Graph:
    """Return the graph with an input `quantized`, bool [places], that chooses for each place."""
    from onnx import TensorProto, helper

    full = quantize(graph, precision, amax)
    new = full.replaced([])
    flags = helper.make_tensor_value_info(FLAGS, TensorProto.BOOL, [len(places)])
    new.inputs = [*full.inputs, flags]
    for number, place in enumerate(places):
        index = new.set_weight(f"{FLAGS}.{number}", np.array(number, np.int64))
        new.nodes.append(node("Gather", [FLAGS, index], place, f"/{FLAGS}/{place}", axis=0))
    plain = {linear.name: linear for linear in find_linears(graph)}
    by_output = {f"{linear.weight}.dequantized": linear for linear in plain.values()}
    for item in full.nodes:
        linear = by_output.get(item.input[1]) if item.op_type == "MatMul" else None
        if linear is None:
            new.nodes.append(item)
            continue
        chosen = []
        for quantized, exact in zip(item.input, (linear.value, linear.weight), strict=True):
            output = f"{linear.name}.{exact}.chosen"
            inputs = [linear.place, quantized, exact]
            new.nodes.append(node("Where", inputs, output, f"{item.name}/{exact}/Where"))
            chosen.append(output)
        new.nodes.append(with_inputs(item, chosen))
    return new
