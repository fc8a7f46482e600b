"""The joint encoder's graph cut after its first layers, with a linear head that reads there.

The head reads three rows of the hidden states: CLS, the mean of the text slots and the mean of
the visual ones. In the first layers a match is written all over the slots and hardly in CLS.

    /shallow/pooling/...    float32 [P, 3, S]: what each slot weighs in each row, by `text_length`
    /shallow/rows/MatMul    float32 [P, 3, H]: one small product a pair
    /shallow/head/...       their product with the head's weight [3 H, 1], and its bias: `scores`

Padding weighs nothing, and the score of a pair depends on nothing but the pair. These nodes are
no nodes of a layer: every precision leaves them in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...arrays import Float32
from ...bundle import (
    KEY,
    OUTPUT,
    SHALLOW,
    TEXT_SLOTS,
    VISUAL_TOKENS,
    layer_of,
    layer_path,
    node_name,
    value_name,
    weight_name,
)
from ...errors import EngineError
from ..precision.graph import Graph, node
from ..precision.lower import ONNX_TYPES

if TYPE_CHECKING:
    import onnx

HEAD = f"{SHALLOW}/head"
ROWS = ("CLS", "mean of the text", "mean of the visual tokens")
_FLOAT32 = ONNX_TYPES["float32"]


@dataclass(frozen=True, slots=True)
class Head:
    """A linear head: score = weight . [CLS, mean of the text, mean of the visual tokens] + bias.

    Attributes:
        weight: float32 [3 H].
        bias: raw logits.
    """

    weight: Float32
    bias: float


def num_layers_of(graph: Graph) -> int:
    """Return how many layers a joint encoder's graph has."""
    numbers = [number for item in graph.nodes if (number := layer_of(item.name)) is not None]
    return max(numbers, default=-1) + 1


def cut(graph: Graph, layers: int, head: Head) -> Graph:
    """Return the float32 graph of the first `layers` layers and `head`; its score is `scores`.

    Raises:
        EngineError: as many layers as the model has, or more, or none.
    """
    check_layers(layers, num_layers_of(graph))
    new = graph.replaced(_needed(graph, hidden_after(graph, layers)))
    rows = add_rows(new, layers, hidden_after(graph, layers))
    weight = new.set_weight(weight_name(HEAD), head.weight.reshape(-1, 1))
    bias = new.set_weight(weight_name(HEAD, "bias"), np.array([head.bias], np.float32))
    axis = _axes(new, 1)
    product, total = value_name(HEAD, "MatMul"), value_name(HEAD, "Add")
    new.nodes += [
        node("MatMul", [rows, weight], product, node_name(HEAD, "MatMul")),
        node("Add", [product, bias], total, node_name(HEAD, "Add")),
        node("Squeeze", [total, axis], OUTPUT, node_name(HEAD, "Squeeze")),
    ]
    return new


def check_layers(layers: int, of: int) -> None:
    """Raise EngineError unless a model of `of` layers can be cut after `layers`."""
    if not 1 <= layers < of:
        raise EngineError(
            f"a shallow engine cannot have {layers} layers: this model has {of}, "
            f"expected 1 to {of - 1}",
            hint="build without --layers for the whole model",
        )


def with_rows(graph: Graph, depths: Sequence[int]) -> tuple[Graph, list[str]]:
    """Return the whole graph, and the names of what a head reads after each of `depths` layers.

    Each is float32 [P, 3 H]: for fitting heads of many depths from one forward.
    """
    new = graph.replaced(graph.nodes)
    return new, [add_rows(new, depth, hidden_after(graph, depth)) for depth in depths]


def hidden_after(graph: Graph, layers: int) -> str:
    """Return the hidden states [P, S, H] that layer number `layers` reads: those of the one before.

    Raises:
        EngineError: this is no joint encoder as `edje export` writes it.
    """
    wanted = node_name(layer_path(layers, KEY), "MatMul")
    found = [item.input[0] for item in graph.nodes if item.name == wanted]
    if not found:
        raise EngineError(f"this graph has no {wanted}", hint="export the checkpoint again")
    return str(found[0])


def add_rows(graph: Graph, layers: int, hidden: str) -> str:
    """Add what a head reads of `hidden`; return its name: float32 [P, 3 H]."""
    weights = _add_pooling(graph)
    path = f"{SHALLOW}/rows.{layers}"
    rows, flat = value_name(path, "MatMul"), value_name(path, "Reshape")
    shape = graph.set_weight("const.shallow.rows", np.array([0, -1], np.int64))
    graph.nodes += [
        node("MatMul", [weights, hidden], rows, node_name(path, "MatMul")),
        node("Reshape", [rows, shape], flat, node_name(path, "Reshape")),
    ]
    return flat


def _add_pooling(graph: Graph) -> str:
    """Add float32 [P, 3, S], once: what each slot weighs in each row of `ROWS`."""
    path = f"{SHALLOW}/pooling"
    done = value_name(path, "Gather")
    if any(done in item.output for item in graph.nodes):
        return done
    num_tokens = _num_tokens(graph)
    slots, lengths = value_name(TEXT_SLOTS, "Range"), value_name(path, "Unsqueeze")
    steps = _Steps(graph, path)
    graph.nodes.append(
        node("Unsqueeze", ["text_length", _axes(graph, 1)], lengths, f"/{path}/Unsqueeze")
    )
    real = steps.add("Cast", "real", [steps.add("Less", "less", [slots, lengths])], to=_FLOAT32)
    count = steps.add("Cast", "count", [lengths], to=_FLOAT32)
    zero = graph.set_weight("const.shallow.zero", np.array([0], np.int32))
    first = steps.add("Cast", "first", [steps.add("Equal", "is_cls", [slots, zero])], to=_FLOAT32)
    none = steps.add("Mul", "none", [real, _scalar(graph, 0.0)])
    text = [
        steps.add("Add", "cls", [first, none]),  # [T] + [Q, T]
        steps.add("Div", "text", [real, count]),
        none,
    ]
    rows = [
        _padded(graph, steps, name, part, num_tokens, weight)
        for name, part, weight in zip(("cls", "text", "visual"), text, (0, 0, 1), strict=True)
    ]
    whole = steps.add("Concat", "rows", rows, axis=1)
    return steps.add("Gather", "", [whole, "query_of_pair"], axis=0)


def _padded(
    graph: Graph, steps: _Steps, name: str, text: str, num_tokens: int, visual: float
) -> str:
    """Add [Q, 1, S]: `text` [Q, T], then `visual` / m for each visual slot, and 0 for SEP."""
    value = _scalar(graph, visual / num_tokens)
    images = graph.set_weight(
        f"const.shallow.pad.{num_tokens}", np.array([0, 0, 0, num_tokens], np.int64)
    )
    one = graph.set_weight("const.shallow.pad.1", np.array([0, 0, 0, 1], np.int64))
    wide = steps.add("Pad", f"{name}_visual", [text, images, value])
    whole = steps.add("Pad", f"{name}_sep", [wide, one])
    return steps.add("Unsqueeze", f"{name}_row", [whole, _axes(graph, 1)])


class _Steps:
    """Adds nodes under one path."""

    def __init__(self, graph: Graph, path: str):
        self._graph, self._path = graph, path

    def add(self, kind: str, name: str, inputs: Sequence[str], **attributes: int) -> str:
        path = f"{self._path}/{name}" if name else self._path
        output = value_name(path, kind)
        self._graph.nodes.append(node(kind, inputs, output, node_name(path, kind), **attributes))
        return output


def _axes(graph: Graph, axis: int) -> str:
    return graph.set_weight(f"const.shallow.axis.{axis}", np.array([axis], np.int64))


def _scalar(graph: Graph, value: float) -> str:
    values: npt.NDArray[np.float32] = np.array(value, np.float32)
    return graph.set_weight(f"const.shallow.scalar.{value:g}", values)


def _num_tokens(graph: Graph) -> int:
    """Return m, the visual tokens of a pair."""
    (tokens,) = (value for value in graph.inputs if value.name == VISUAL_TOKENS)
    return int(tokens.type.tensor_type.shape.dim[1].dim_value)


def _needed(graph: Graph, value: str) -> list[onnx.NodeProto]:
    """Return the nodes that `value`, and the number of text slots, are made of; in order."""
    wanted, kept = {value, value_name(TEXT_SLOTS, "Range")}, []
    for item in reversed(graph.nodes):
        if wanted & set(item.output):
            kept.append(item)
            wanted.update(item.input)
    return kept[::-1]
