"""`adapter.onnx` and `image_encoder.onnx`: the graphs that make stored tokens.

What differs from the references is exact but for rounding: the adapter's doubled key and value
maps are folded into one each (in float64), its projected queries are a constant, and 1/sqrt(d)
is folded into the queries.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn

from .adapter import Adapter
from .configs import VisionConfig
from .graph_blocks import (
    FLOAT16,
    Linear,
    array,
    arrays,
    attention,
    feed_forward,
    layer_norm,
    linear,
    split_heads,
)
from .graph_builder import GraphBuilder, int64
from .image_encoder import ImageEncoder
from .joint_encoder import split_heads as split_tensor_heads

if TYPE_CHECKING:
    import onnx


def adapter_graph(adapter: Adapter) -> onnx.ModelProto:
    """Return `features` float32 [B, N, D] -> `visual_tokens` float16 [B, m, H]; B, N dynamic."""
    graph = GraphBuilder("adapter")
    features = graph.input("features", "float32", ["B", "N", adapter.config.feature_dim])
    _add_adapter(graph, adapter, features)
    return graph.model()


def image_encoder_graph(encoder: ImageEncoder, config: VisionConfig) -> onnx.ModelProto:
    """Return `pixels` float32 [B, 3, R, R] -> `visual_tokens` float16 [B, m, H]; B dynamic."""
    graph = GraphBuilder("image_encoder")
    size = config.image_size
    pixels = graph.input("pixels", "float32", ["B", 3, size, size])
    tower: Any = getattr(encoder.tower, "vision_model", encoder.tower)  # transformers 4 nests it
    features = _patches(graph, config, tower.embeddings, pixels)
    for index, layer in enumerate(tower.encoder.layers):
        features = _vision_layer(graph, f"vision.layers.{index}", config, layer, features)
    features = layer_norm(graph, "vision/post_norm", features, tower.post_layernorm)
    _add_adapter(graph, encoder.adapter, features)
    return graph.model()


def _patches(graph: GraphBuilder, config: VisionConfig, embeddings: Any, pixels: str) -> str:
    """Add the patch convolution and the positions: [B, N, D]."""
    kernel = graph.weight("vision.patch.weight", array(embeddings.patch_embedding.weight))
    bias = graph.weight("vision.patch.bias", array(embeddings.patch_embedding.bias))
    strides = [config.patch_size] * 2
    x = graph.op(
        "Conv", "vision/patch", pixels, kernel, bias, kernel_shape=strides, strides=strides
    )
    x = graph.op("Reshape", "vision/patch", x, int64(0, config.hidden, config.num_features))
    x = graph.op("Transpose", "vision/patch", x, perm=[0, 2, 1])
    positions = array(embeddings.position_embedding.weight)
    return graph.op("Add", "vision/position", x, graph.weight("vision.position.weight", positions))


def _vision_layer(
    graph: GraphBuilder, path: str, config: VisionConfig, layer: Any, features: str
) -> str:
    """Add one pre-norm layer of the vision tower."""
    heads, width = config.num_heads, config.hidden
    x = layer_norm(graph, f"{path}/attention_norm", features, layer.layer_norm1)
    maps = layer.self_attn
    query_map = arrays(maps.q_proj, scale=1 / math.sqrt(width // heads))
    query = linear(graph, f"{path}/query", x, query_map)
    key = linear(graph, f"{path}/key", x, arrays(maps.k_proj))
    value = linear(graph, f"{path}/value", x, arrays(maps.v_proj))
    query = split_heads(graph, f"{path}/query", query, heads, width)
    key = split_heads(graph, f"{path}/key", key, heads, width, transposed=True)
    value = split_heads(graph, f"{path}/value", value, heads, width)
    x = attention(graph, path, query, key, value, width)
    x = linear(graph, f"{path}/attention_output", x, arrays(maps.out_proj))
    features = graph.op("Add", f"{path}/attention_residual", features, x)
    x = layer_norm(graph, f"{path}/ffn_norm", features, layer.layer_norm2)
    x = feed_forward(graph, path, x, layer.mlp.fc1, layer.mlp.fc2, config.activation)
    return graph.op("Add", f"{path}/ffn_residual", features, x)


def _add_adapter(graph: GraphBuilder, adapter: Adapter, features: str) -> None:
    """Add the folded adapter; its output is the graph output `visual_tokens`."""
    config = adapter.config
    heads, width = config.num_heads, config.feature_dim
    query = split_tensor_heads(adapter.attention_query(adapter.query)[None], heads)
    query = query / math.sqrt(width // heads)
    queries = graph.weight("adapter.queries", array(query))  # [1, heads, m, d]
    key = folded(adapter.key, adapter.attention_key)
    value = folded(adapter.value, adapter.attention_value)
    keys = linear(graph, "adapter/key", features, key)
    keys = split_heads(graph, "adapter/key", keys, heads, width, transposed=True)
    values = linear(graph, "adapter/value", features, value)
    values = split_heads(graph, "adapter/value", values, heads, width)
    x = attention(graph, "adapter", queries, keys, values, width)
    x = linear(graph, "adapter/attention_output", x, arrays(adapter.attention_output))
    wide = layer_norm(graph, "adapter/norm", x, adapter.norm)
    wide = feed_forward(graph, "adapter", wide, adapter.ffn1, adapter.ffn2, config.activation)
    x = graph.op("Add", "adapter/residual", x, wide)
    x = linear(graph, "adapter/projection", x, arrays(adapter.projection))
    graph.op("Cast", "adapter/float16", x, to=FLOAT16, output="visual_tokens")
    graph.output("visual_tokens", "float16", ["B", config.num_tokens, config.hidden])


def folded(first: nn.Linear, second: nn.Linear) -> Linear:
    """Return the one linear map that `second(first(x))` is, computed in float64."""
    weight = second.weight.double() @ first.weight.double()
    bias = second.weight.double() @ first.bias.double() + second.bias.double()
    return array(weight), array(bias)
