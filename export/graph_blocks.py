"""The blocks that all graphs share: linear maps, norms, attention, the feed-forward."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from .activations import ONNX_ACTIVATIONS
from .graph_builder import Array, GraphBuilder, int64

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
    name = path.replace("/", ".")
    kernel = graph.weight(f"{name}.weight", weight.T)  # stored as [in, out]
    product = graph.op("MatMul", path, x, kernel)
    return graph.op("Add", path, product, graph.weight(f"{name}.bias", bias))


def layer_norm(
    graph: GraphBuilder, path: str, x: str, module: nn.LayerNorm, *, weights: str | None = None
) -> str:
    """Add an `nn.LayerNorm`; `weights` names shared weights where one norm is used twice."""
    name = weights or path.replace("/", ".")
    scale = graph.weight(f"{name}.weight", array(module.weight))
    shift = graph.weight(f"{name}.bias", array(module.bias))
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
    scores = graph.op("MatMul", f"{path}/attention_scores", query, key)
    if mask is not None:
        scores = graph.op("Add", f"{path}/attention_scores", scores, mask)
    scores = graph.op("Softmax", f"{path}/attention", scores, axis=-1)
    context = graph.op("MatMul", f"{path}/context", scores, value)
    context = graph.op("Transpose", f"{path}/context", context, perm=[0, 2, 1, 3])
    return graph.op("Reshape", f"{path}/context", context, int64(0, 0, width))


def feed_forward(
    graph: GraphBuilder, path: str, x: str, fc1: nn.Linear, fc2: nn.Linear, activation: str
) -> str:
    """Add fc1, the activation and fc2 under `path`/ffn1 and `path`/ffn2."""
    kind, attributes = ONNX_ACTIVATIONS[activation]
    x = linear(graph, f"{path}/ffn1", x, arrays(fc1))
    x = graph.op(kind, f"{path}/ffn1", x, **attributes)
    return linear(graph, f"{path}/ffn2", x, arrays(fc2))
