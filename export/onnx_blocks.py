"""ONNX graphs, node by node: a builder, and the blocks that every graph is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from ..arrays import Array
from ..bundle import (
    ATTENTION,
    ATTENTION_OUTPUT,
    ATTENTION_SCORES,
    CONTEXT,
    FFN1,
    FFN2,
    KEY,
    QUERY,
    VALUE,
    node_name,
    value_name,
    weight_name,
)
from ..errors import CheckpointError
from .configs import ACTIVATIONS

if TYPE_CHECKING:
    import onnx


OPSET = 20  # the first with Gelu; LayerNormalization is there since 17
IR_VERSION = 10
MAX_BYTES = 2**31 - 2**24  # of a protobuf message, less the room for the nodes


class GraphBuilder:
    """Collects nodes and weights; a value is named after the node that makes it.

    Why not `torch.onnx.export`: engines and the precision passes that follow live on this graph,
    and tracing gives nameless weights, shape arithmetic and int64 casts (seen: torch 2.13). The
    graph is checked against the PyTorch reference on every export instead.
    """

    def __init__(self, name: str):
        self.name = name
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, Array] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare a graph input; a string in `shape` is a dynamic dimension."""
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare a graph output; some node must make a value of that name."""
        self._outputs.append(_value_info(name, dtype, shape))

    def weight(self, name: str, value: Array) -> str:
        """Store a weight under `name`, once, and return the name."""
        if name not in self._weights:
            self._weights[name] = np.ascontiguousarray(value)
        return name

    def op(self, kind: str, path: str, *inputs: str | Array, **attributes: Any) -> str:
        """Add the node `/path/kind` and return the name of its one output.

        `inputs` are value names, or small arrays that become constants. `output=` names the
        output otherwise, for graph outputs.
        """
        output = str(attributes.pop("output", value_name(path, kind)))
        self._add(kind, path, inputs, [output], attributes)
        return output

    def split(self, path: str, value: str, sizes: Sequence[int], *, axis: int) -> list[str]:
        """Split `value` along `axis` into parts of `sizes`."""
        outputs = [f"{value_name(path, 'Split')}_{index}" for index in range(len(sizes))]
        self._add("Split", path, (value, int64(*sizes)), outputs, {"axis": axis})
        return outputs

    def model(self) -> onnx.ModelProto:
        """Return the model; the builder lets go of its weights, which can be gigabytes.

        Raises:
            CheckpointError: more weights than one ONNX file holds.
        """
        from onnx import helper, numpy_helper

        num_bytes = sum(value.nbytes for value in self._weights.values())
        if num_bytes >= MAX_BYTES:
            raise CheckpointError(
                f"the {self.name} holds {num_bytes / 1e9:.2f} GB of float32 weights, expected "
                f"less than {MAX_BYTES / 1e9:.2f} GB: an ONNX file holds no more"
            )
        weights = []
        for name in list(self._weights):
            weights.append(numpy_helper.from_array(self._weights.pop(name), name))
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, weights)
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="edje",
        )

    def _add(
        self,
        kind: str,
        path: str,
        inputs: Sequence[str | Array],
        outputs: list[str],
        attributes: dict[str, Any],
    ) -> None:
        from onnx import helper

        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        name = node_name(path, kind)
        self._nodes.append(helper.make_node(kind, names, outputs, name, **attributes))

    def _constant(self, value: Array) -> str:
        """Store a small constant under a name that tells its content, so equal ones are one."""
        content = "_".join(str(number) for number in value.ravel().tolist())
        kind = "scalar" if value.ndim == 0 else "vector"
        return self.weight(f"const.{value.dtype}.{kind}.{content}", value)


def int64(*values: int) -> Array:
    """Return a 1-D int64 constant, as axes and shapes are given in ONNX."""
    return np.array(values, dtype=np.int64)


def scalar(value: float, dtype: str) -> Array:
    """Return a 0-D constant."""
    return np.array(value, dtype=dtype)


def _value_info(name: str, dtype: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, kind, list(shape))


FLOAT, INT32, FLOAT16 = 1, 6, 10  # onnx.TensorProto's numbers, as Cast takes them


def array(tensor: Tensor) -> Array:
    """Return a parameter as a float32 array that shares its memory."""
    result: Array = tensor.detach().float().numpy()
    return result


Linear = tuple[Array, Array]  # weight [out, in] as PyTorch has it, bias [out]


def arrays(module: nn.Linear, *, scale: float = 1.0) -> Linear:
    """Return weight and bias of an `nn.Linear`, times `scale`."""
    weight, bias = array(module.weight), array(module.bias)
    if scale == 1.0:
        return weight, bias
    return weight * np.float32(scale), bias * np.float32(scale)


def linear(graph: GraphBuilder, path: str, x: str, weights: Linear) -> str:
    """Add `x @ weight.T + bias`."""
    weight, bias = weights
    kernel = graph.weight(weight_name(path), weight.T)  # stored as [in, out]
    product = graph.op("MatMul", path, x, kernel)
    return graph.op("Add", path, product, graph.weight(weight_name(path, "bias"), bias))


def layer_norm(
    graph: GraphBuilder, path: str, x: str, module: nn.LayerNorm, *, weights: str | None = None
) -> str:
    """Add an `nn.LayerNorm`; `weights` names shared weights where one norm is used twice."""
    name = weights or path
    scale = graph.weight(weight_name(name), array(module.weight))
    shift = graph.weight(weight_name(name, "bias"), array(module.bias))
    return graph.op("LayerNormalization", path, x, scale, shift, axis=-1, epsilon=module.eps)


def split_heads(
    graph: GraphBuilder, path: str, x: str, num_heads: int, width: int, *, transposed: bool = False
) -> str:
    """Add [B, S, H] -> [B, heads, S, d], or [B, heads, d, S] where `transposed`."""
    x = graph.op("Reshape", path, x, int64(0, 0, num_heads, width // num_heads))
    return graph.op("Transpose", path, x, perm=[0, 2, 3, 1] if transposed else [0, 2, 1, 3])


def attention(
    graph: GraphBuilder,
    path: str,
    query: str,
    key: str,
    value: str,
    width: int,
    mask: str | None = None,
) -> str:
    """Add softmax(query @ key + mask) @ value with the heads joined: [B, R, H].

    `query` [B, heads, R, d] is scaled by 1/sqrt(d) already, `key` is [B, heads, d, S].
    """
    scores = graph.op("MatMul", f"{path}/{ATTENTION_SCORES}", query, key)
    if mask is not None:
        scores = graph.op("Add", f"{path}/{ATTENTION_SCORES}", scores, mask)
    scores = graph.op("Softmax", f"{path}/{ATTENTION}", scores, axis=-1)
    context = graph.op("MatMul", f"{path}/{CONTEXT}", scores, value)
    context = graph.op("Transpose", f"{path}/{CONTEXT}", context, perm=[0, 2, 1, 3])
    return graph.op("Reshape", f"{path}/{CONTEXT}", context, int64(0, 0, width))


def self_attention(
    graph: GraphBuilder,
    path: str,
    rows: str,
    slots: str,
    maps: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear],
    num_heads: int,
    mask: str | None = None,
) -> str:
    """Add attention from `rows` [B, R, H] to `slots` [B, S, H]: [B, R, H].

    `maps` are those of query, key, value and output.
    """
    width = maps[0].in_features
    scaled = arrays(maps[0], scale=1 / math.sqrt(width // num_heads))
    query = linear(graph, f"{path}/{QUERY}", rows, scaled)
    key = linear(graph, f"{path}/{KEY}", slots, arrays(maps[1]))
    value = linear(graph, f"{path}/{VALUE}", slots, arrays(maps[2]))
    query = split_heads(graph, f"{path}/{QUERY}", query, num_heads, width)
    key = split_heads(graph, f"{path}/{KEY}", key, num_heads, width, transposed=True)
    value = split_heads(graph, f"{path}/{VALUE}", value, num_heads, width)
    context = attention(graph, path, query, key, value, width, mask)
    return linear(graph, f"{path}/{ATTENTION_OUTPUT}", context, arrays(maps[3]))


def feed_forward(
    graph: GraphBuilder, path: str, x: str, fc1: nn.Linear, fc2: nn.Linear, activation: str
) -> str:
    """Add fc1, the activation and fc2 under `FFN1` and `FFN2` of `path`."""
    kind, attributes = ACTIVATIONS[activation]
    x = linear(graph, f"{path}/{FFN1}", x, arrays(fc1))
    x = graph.op(kind, f"{path}/{FFN1}", x, **attributes)
    return linear(graph, f"{path}/{FFN2}", x, arrays(fc2))
