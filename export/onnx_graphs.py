"""The ONNX graphs of a bundle: adapter, image encoder and joint encoder."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import nn

from ..bundle import INPUTS, OUTPUT, TEXT_SLOTS, VISUAL_TOKENS, WORD_EMBEDDINGS, layer_path
from .configs import num_features
from .onnx_blocks import (
    FLOAT,
    FLOAT16,
    INT32,
    GraphBuilder,
    Linear,
    array,
    arrays,
    attention,
    feed_forward,
    int64,
    layer_norm,
    linear,
    scalar,
    self_attention,
    split_heads,
)
from .reference import MASKED, Adapter, ImageEncoder, JointEncoder, Layer
from .reference import split_heads as split_tensor_heads

if TYPE_CHECKING:
    import onnx
    from transformers import SiglipVisionConfig


def adapter_graph(adapter: Adapter) -> onnx.ModelProto:
    """Return `features` float32 [B, N, D] -> `visual_tokens` float16 [B, m, H]; B, N dynamic."""
    graph = GraphBuilder("adapter")
    features = graph.input("features", "float32", ["B", "N", adapter.sizes.feature_dim])
    _add_adapter(graph, adapter, features)
    return graph.model()


def image_encoder_graph(encoder: ImageEncoder, config: SiglipVisionConfig) -> onnx.ModelProto:
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


def _patches(graph: GraphBuilder, config: SiglipVisionConfig, embeddings: Any, pixels: str) -> str:
    """Add the patch convolution and the positions: [B, N, D]."""
    kernel = graph.weight("vision.patch.weight", array(embeddings.patch_embedding.weight))
    bias = graph.weight("vision.patch.bias", array(embeddings.patch_embedding.bias))
    strides = [config.patch_size] * 2
    x = graph.op(
        "Conv", "vision/patch", pixels, kernel, bias, kernel_shape=strides, strides=strides
    )
    x = graph.op("Reshape", "vision/patch", x, int64(0, config.hidden_size, num_features(config)))
    x = graph.op("Transpose", "vision/patch", x, perm=[0, 2, 1])
    positions = array(embeddings.position_embedding.weight)
    return graph.op("Add", "vision/position", x, graph.weight("vision.position.weight", positions))


def _vision_layer(
    graph: GraphBuilder, path: str, config: SiglipVisionConfig, layer: Any, features: str
) -> str:
    """Add one pre-norm layer of the vision tower."""
    x = layer_norm(graph, f"{path}/attention_norm", features, layer.layer_norm1)
    own = layer.self_attn
    maps = (own.q_proj, own.k_proj, own.v_proj, own.out_proj)
    x = self_attention(graph, path, x, x, maps, config.num_attention_heads)
    features = graph.op("Add", f"{path}/attention_residual", features, x)
    x = layer_norm(graph, f"{path}/ffn_norm", features, layer.layer_norm2)
    x = feed_forward(graph, path, x, layer.mlp.fc1, layer.mlp.fc2, config.hidden_act)
    return graph.op("Add", f"{path}/ffn_residual", features, x)


def _add_adapter(graph: GraphBuilder, adapter: Adapter, features: str) -> None:
    """Add the folded adapter; its output is the graph output `visual_tokens`."""
    sizes, heads, width = adapter.sizes, adapter.num_heads, adapter.sizes.feature_dim
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
    wide = feed_forward(graph, "adapter", wide, adapter.ffn1, adapter.ffn2, adapter.activation_name)
    x = graph.op("Add", "adapter/residual", x, wide)
    x = linear(graph, "adapter/projection", x, arrays(adapter.projection))
    graph.op("Cast", "adapter/float16", x, to=FLOAT16, output=VISUAL_TOKENS)
    graph.output(VISUAL_TOKENS, "float16", ["B", sizes.num_tokens, sizes.hidden])


def folded(first: nn.Linear, second: nn.Linear) -> Linear:
    """Return the one linear map that `second(first(x))` is, computed in float64."""
    weight = second.weight.double() @ first.weight.double()
    bias = second.weight.double() @ first.bias.double() + second.bias.double()
    return array(weight), array(bias)


def joint_encoder_graph(model: JointEncoder) -> onnx.ModelProto:
    """Return the ONNX model of the online scorer.

    Inputs `text_ids` int32 [Q, T], `text_length` int32 [Q], `query_of_pair` int32 [P],
    `visual_tokens` float16 [P, m, H]; output `scores` float32 [P]. Q, T and P are dynamic.
    """
    graph = GraphBuilder("joint_encoder")
    shapes: tuple[list[int | str], ...] = (
        ["Q", "T"],
        ["Q"],
        ["P"],
        ["P", model.num_tokens, model.config.hidden],
    )
    for name, shape in zip(INPUTS, shapes, strict=True):
        graph.input(name, "float16" if name == VISUAL_TOKENS else "int32", shape)
    graph.output(OUTPUT, "float32", ["P"])
    order = _slot_numbers(graph)
    lengths = graph.op("Unsqueeze", "text/length", "text_length", int64(1))  # [Q, 1]
    slots = _sequence(graph, model, order, lengths)
    mask = _mask(graph, model, order, lengths)
    layers = cast("list[Layer]", list(model.layers))
    for index, layer in enumerate(layers[:-1]):
        slots = _layer(graph, layer_path(index), layer, slots, slots, mask)
    last = layer_path(len(layers) - 1)  # for the CLS row alone, over the keys of every slot
    cls = graph.op("Gather", f"{last}/cls", slots, int64(0), axis=1)  # [P, 1, H]
    _head(graph, model, _layer(graph, last, layers[-1], cls, slots, mask))
    return graph.model()


def _slot_numbers(graph: GraphBuilder) -> str:
    """Add int32 [T]: 0, 1, ... T-1."""
    shape = graph.op("Shape", TEXT_SLOTS, "text_ids", start=1, end=2)
    stop = graph.op("Squeeze", TEXT_SLOTS, shape, int64(0))
    stop = graph.op("Cast", TEXT_SLOTS, stop, to=INT32)
    return graph.op("Range", TEXT_SLOTS, scalar(0, "int32"), stop, scalar(1, "int32"))


def _sequence(graph: GraphBuilder, model: JointEncoder, order: str, lengths: str) -> str:
    """Add the embedded sequence [P, T + m + 1, H]: text, visual tokens, last SEP."""
    text = _text(graph, model, order)
    tail = _tail_positions(graph, model, lengths)
    positions, sep = graph.split("embeddings/tail", tail, [model.num_tokens, 1], axis=1)
    word = array(model.word_embeddings.weight)[model.config.sep_id]
    sep = graph.op("Add", "embeddings/sep", sep, graph.weight("embeddings.sep.weight", word))
    sep = _norm(graph, "embeddings/sep_norm", model, sep)
    tokens = graph.op("Cast", VISUAL_TOKENS, VISUAL_TOKENS, to=FLOAT)
    tokens = graph.op("Add", "embeddings/visual", tokens, _per_pair(graph, "position", positions))
    tokens = _norm(graph, "embeddings/visual_norm", model, tokens)
    parts = (_per_pair(graph, "text", text), tokens, _per_pair(graph, "sep", sep))
    return graph.op("Concat", "pairs/slots", *parts, axis=1)


def _text(graph: GraphBuilder, model: JointEncoder, order: str) -> str:
    """Add the text embeddings [Q, T, H], once per query."""
    words = graph.weight("embeddings.word.weight", array(model.word_embeddings.weight))
    text = graph.op("Gather", WORD_EMBEDDINGS, words, "text_ids", axis=0)
    rows = graph.op("Gather", "embeddings/text_position", _position_table(graph, model), order)
    kind = graph.weight("embeddings.text_type.weight", array(model.type_embeddings.weight)[0])
    rows = graph.op("Add", "embeddings/text_type", rows, kind)
    text = graph.op("Add", "embeddings/text", text, rows)
    return _norm(graph, "embeddings/text_norm", model, text)


def _tail_positions(graph: GraphBuilder, model: JointEncoder, lengths: str) -> str:
    """Add position and type of the visual tokens and last SEP: [Q, m + 1, H]."""
    offsets = np.arange(model.num_tokens + 1, dtype=np.int32)
    stored = graph.weight("embeddings.tail_offsets", offsets)
    rows = graph.op("Add", "embeddings/tail_offsets", lengths, stored)
    tail = graph.op("Gather", "embeddings/tail_position", _position_table(graph, model), rows)
    kind = graph.weight("embeddings.tail_type.weight", array(model.type_embeddings.weight)[1])
    return graph.op("Add", "embeddings/tail_type", tail, kind)


def _position_table(graph: GraphBuilder, model: JointEncoder) -> str:
    return graph.weight("embeddings.position.weight", array(model.position_embeddings.weight))


def _norm(graph: GraphBuilder, path: str, model: JointEncoder, x: str) -> str:
    return layer_norm(graph, path, x, model.embedding_norm, weights="embeddings.norm")


def _per_pair(graph: GraphBuilder, name: str, x: str) -> str:
    """Add the gather from one row a query to one row a pair."""
    return graph.op("Gather", f"pairs/{name}", x, "query_of_pair", axis=0)


def _mask(graph: GraphBuilder, model: JointEncoder, order: str, lengths: str) -> str:
    """Add [P, 1, 1, T + m + 1]: 0 for real slots, `MASKED` for text padding."""
    real = graph.op("Less", "mask", order, lengths)  # [Q, T]
    mask = graph.op("Where", "mask", real, scalar(0, "float32"), scalar(MASKED, "float32"))
    mask = graph.op("Pad", "mask", mask, int64(0, 0, 0, model.num_tokens + 1))
    return _per_pair(graph, "mask", graph.op("Unsqueeze", "mask", mask, int64(1, 2)))


def _layer(graph: GraphBuilder, path: str, layer: Layer, rows: str, slots: str, mask: str) -> str:
    """Add attention from `rows` to `slots`, feed-forward and their norms for `rows`."""
    maps = (layer.query, layer.key, layer.value, layer.attention_output)
    context = self_attention(graph, path, rows, slots, maps, layer.num_heads, mask)
    rows = graph.op("Add", f"{path}/attention_residual", context, rows)
    rows = layer_norm(graph, f"{path}/attention_norm", rows, layer.attention_norm)
    wide = feed_forward(graph, path, rows, layer.ffn1, layer.ffn2, layer.activation_name)
    rows = graph.op("Add", f"{path}/ffn_residual", wide, rows)
    return layer_norm(graph, f"{path}/ffn_norm", rows, layer.ffn_norm)


def _head(graph: GraphBuilder, model: JointEncoder, cls: str) -> None:
    """Add pooler and classifier: [P, 1, H] -> `scores` [P]."""
    pooled = graph.op("Squeeze", "pooler", cls, int64(1))
    pooled = linear(graph, "pooler", pooled, arrays(model.pooler))
    pooled = graph.op("Tanh", "pooler", pooled)
    logit = linear(graph, "classifier", pooled, arrays(model.classifier))
    graph.op("Squeeze", "classifier", logit, int64(1), output=OUTPUT)
