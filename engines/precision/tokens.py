"""The variant of a graph that reads int8 tokens: `visual_tokens` int8 and a scale a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...errors import EngineError
from .graph import Graph, node
from .lower import ONNX_TYPES

if TYPE_CHECKING:
    import onnx

TOKENS, SCALES = "visual_tokens", "visual_scales"


def take_int8_tokens(graph: Graph) -> Graph:
    """Return the graph with `visual_tokens` int8 [P, m, H] and `visual_scales` float16 [P, m].

    A token is its int8 values times its scale, in float32; everything behind is as it was.
    """
    from onnx import TensorProto, helper

    new = graph.replaced([])
    shape = [
        dim.dim_param or dim.dim_value
        for value in graph.inputs
        if value.name == TOKENS
        for dim in value.type.tensor_type.shape.dim
    ]
    tokens = helper.make_tensor_value_info(TOKENS, TensorProto.INT8, shape)
    scales = helper.make_tensor_value_info(SCALES, TensorProto.FLOAT16, shape[:2])
    new.inputs = [value for value in graph.inputs if value.name != TOKENS] + [tokens, scales]
    for item in graph.nodes:
        if TOKENS not in item.input:
            new.nodes.append(item)
            continue
        if item.op_type != "Cast":
            raise EngineError(f"{item.name} reads {TOKENS} uncast, expected a Cast to float32")
        new.nodes += _dequantize(new, item.output[0])
    return new


def _dequantize(graph: Graph, output: str) -> list[onnx.NodeProto]:
    """Return the nodes that make `output`: float32 [P, m, H]."""
    axis = graph.set_weight(f"{SCALES}.axis", np.array([2], np.int64))
    path, float32 = f"/{SCALES}", ONNX_TYPES["float32"]
    return [
        node("Cast", [TOKENS], f"/{TOKENS}/int8_output", f"/{TOKENS}/int8/Cast", to=float32),
        node("Cast", [SCALES], f"{path}/Cast_output", f"{path}/Cast", to=float32),
        node("Unsqueeze", [f"{path}/Cast_output", axis], f"{path}/column", f"{path}/Unsqueeze"),
        node("Mul", [f"/{TOKENS}/int8_output", f"{path}/column"], output, f"{path}/Mul"),
    ]
