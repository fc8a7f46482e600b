"""`joint_encoder.onnx`: the graph of `JointEncoder`, shaped for inference engines.

What differs from the reference is exact but for rounding: 1/sqrt(d) is folded into the query's
weights and bias. Query, key and value stay three products: of one product side by side, the split
is a pass over memory of its own, which costs int8 on a CPU a fifth of its speed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import numpy as np

from .graph_blocks import (
    FLOAT,
    INT32,
    Linear,
    array,
    arrays,
    attention,
    feed_forward,
    layer_norm,
    linear,
    split_heads,
)
from .graph_builder import GraphBuilder, int64, scalar
from .joint_encoder import MASKED, JointEncoder, Layer

if TYPE_CHECKING:
    import onnx


def joint_encoder_graph(model: JointEncoder) -> onnx.ModelProto:
    """Return the ONNX model of the online scorer.

    Inputs `text_ids` int32 [Q, T], `text_length` int32 [Q], `query_of_pair` int32 [P],
    `visual_tokens` float16 [P, m, H]; output `scores` float32 [P]. Q, T and P are dynamic.
    """
    graph = GraphBuilder("joint_encoder")
    graph.input("text_ids", "int32", ["Q", "T"])
    graph.input("text_length", "int32", ["Q"])
    graph.input("query_of_pair", "int32", ["P"])
    graph.input("visual_tokens", "float16", ["P", model.num_tokens, model.config.hidden])
    graph.output("scores", "float32", ["P"])
    order = _slot_numbers(graph)
    lengths = graph.op("Unsqueeze", "text/length", "text_length", int64(1))  # [Q, 1]
    slots = _sequence(graph, model, order, lengths)
    mask = _mask(graph, model, order, lengths)
    layers = cast("list[Layer]", list(model.layers))
    for index, layer in enumerate(layers[:-1]):
        slots = _layer(graph, f"layers.{index}", layer, slots, mask)
    cls = _last_layer(graph, f"layers.{len(layers) - 1}", layers[-1], slots, mask)
    _head(graph, model, cls)
    return graph.model()


def _slot_numbers(graph: GraphBuilder) -> str:
    """Add int32 [T]: 0, 1, ... T-1."""
    shape = graph.op("Shape", "text/slots", "text_ids", start=1, end=2)
    stop = graph.op("Squeeze", "text/slots", shape, int64(0))
    stop = graph.op("Cast", "text/slots", stop, to=INT32)
    return graph.op("Range", "text/slots", scalar(0, "int32"), stop, scalar(1, "int32"))


def _sequence(graph: GraphBuilder, model: JointEncoder, order: str, lengths: str) -> str:
    """Add the embedded sequence [P, T + m + 1, H]: text, visual tokens, last SEP."""
    text = _text(graph, model, order)
    tail = _tail_positions(graph, model, lengths)
    positions, sep = graph.split("embeddings/tail", tail, [model.num_tokens, 1], axis=1)
    word = array(model.word_embeddings.weight)[model.config.sep_id]
    sep = graph.op("Add", "embeddings/sep", sep, graph.weight("embeddings.sep.weight", word))
    sep = _norm(graph, "embeddings/sep_norm", model, sep)
    tokens = graph.op("Cast", "visual_tokens", "visual_tokens", to=FLOAT)
    tokens = graph.op("Add", "embeddings/visual", tokens, _per_pair(graph, "position", positions))
    tokens = _norm(graph, "embeddings/visual_norm", model, tokens)
    parts = (_per_pair(graph, "text", text), tokens, _per_pair(graph, "sep", sep))
    return graph.op("Concat", "pairs/slots", *parts, axis=1)


def _text(graph: GraphBuilder, model: JointEncoder, order: str) -> str:
    """Add the text embeddings [Q, T, H], once per query."""
    words = graph.weight("embeddings.word.weight", array(model.word_embeddings.weight))
    text = graph.op("Gather", "embeddings/word", words, "text_ids", axis=0)
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


def _layer(graph: GraphBuilder, path: str, layer: Layer, slots: str, mask: str) -> str:
    """Add one whole layer."""
    return _finish(graph, path, layer, slots, slots, mask)


def _last_layer(graph: GraphBuilder, path: str, layer: Layer, slots: str, mask: str) -> str:
    """Add the last layer for the CLS row: keys and values of every slot, one query."""
    cls = graph.op("Gather", f"{path}/cls", slots, int64(0), axis=1)  # [P, 1, H]
    return _finish(graph, path, layer, cls, slots, mask)


def _scaled_query(layer: Layer) -> Linear:
    return arrays(layer.query, scale=1 / math.sqrt(layer.query.in_features // layer.num_heads))


def _finish(graph: GraphBuilder, path: str, layer: Layer, rows: str, slots: str, mask: str) -> str:
    """Add attention from `rows` to `slots`, feed-forward and their norms for `rows`."""
    width, heads = layer.query.in_features, layer.num_heads
    query = linear(graph, f"{path}/query", rows, _scaled_query(layer))
    key = linear(graph, f"{path}/key", slots, arrays(layer.key))
    value = linear(graph, f"{path}/value", slots, arrays(layer.value))
    query = split_heads(graph, f"{path}/query", query, heads, width)
    key = split_heads(graph, f"{path}/key", key, heads, width, transposed=True)
    value = split_heads(graph, f"{path}/value", value, heads, width)
    context = attention(graph, path, query, key, value, width, mask)
    context = linear(graph, f"{path}/attention_output", context, arrays(layer.attention_output))
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
    graph.op("Squeeze", "classifier", logit, int64(1), output="scores")
