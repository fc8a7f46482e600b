"""float32 -> float16 or bfloat16, typed value by value: nothing is left to an engine's choice.

The layers run in the low type. Embeddings and their norms stay float32 (raw visual tokens may be
large), and so do mask and softmax, pooler and classifier; LayerNorm keeps its statistics in float32
by its `stash_type`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle import ATTENTION_SCORES, WORD_EMBEDDINGS, node_name
from ...errors import EngineError
from .graph import Graph, in_layers, node, with_inputs

if TYPE_CHECKING:
    import onnx

ONNX_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
# The table of word embeddings, half of a full-size graph: its rows are gathered once a query, so
# float16 takes no time and saves 23 MB. bfloat16 would round them eight times as much.
WORD_GATHER = node_name(WORD_EMBEDDINGS, "Gather")
STAYS_FLOAT32 = {
    "embeddings": "raw visual tokens may exceed float16 before their norm (words: a float16 table)",
    "attention_scores/Add": "the mask's -1e4 and the scores would round",
    "attention/Softmax": "its sums would round",
    "LayerNormalization statistics": "variances overflow float16; epsilon 1e-12 vanishes in it",
    "pooler": "one row a pair; the score's last digits",
    "classifier": "one row a pair; the score's last digits",
}


def lower(graph: Graph, element: str) -> Graph:
    """Return the graph with the layers in `element` (`float16` or `bfloat16`).

    Raises:
        EngineError: weights larger than the type takes (all named).
    """
    new = graph.replaced([])
    caster = _Caster(new, element)
    for item in graph.nodes:
        if element == "float16" and item.name == WORD_GATHER:
            new.nodes += caster.gather_low(item)
            continue
        low = in_layers(item) and not _stays(item)
        inputs = [caster.take(name, low) for name in item.input]
        new.nodes.append(with_inputs(item, inputs))
        if low and item.op_type != "QuantizeLinear":
            caster.low.update(item.output)
        elif item.op_type == "QuantizeLinear":
            caster.untouched.update(item.output)
    _raise_overflows(caster)
    return new


def numpy_type(element: str) -> np.dtype[Any]:
    """Return the NumPy type of an ONNX element type; bfloat16 is `ml_dtypes`'."""
    if element != "bfloat16":
        return np.dtype(element)
    import ml_dtypes

    kind: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return kind


class _Caster:
    """Gives nodes their inputs in the type they want, each value cast once."""

    def __init__(self, graph: Graph, element: str):
        self._graph = graph
        self._element = element
        self._cast: dict[str, str] = {}
        self.low: set[str] = set()
        self.untouched: set[str] = set()  # quantised integers
        self.overflows: dict[str, float] = {}

    def take(self, name: str, low: bool) -> str:
        """Return the name under which a node finds the value `name` in the type it wants."""
        if name in self._graph.weights:
            return self._weight(name) if low else name
        if name in self.untouched or (name in self.low) == low:
            return name
        element = self._element if low else "float32"
        key = f"{name}.{element}"
        if key not in self._cast:
            path = f"{name.removesuffix('_output')}/to_{element}/Cast"
            self._graph.nodes.append(node("Cast", [name], key, path, to=ONNX_TYPES[element]))
            self._cast[key] = key
        return key

    def gather_low(self, item: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the gather from the table in the low type, and the cast back to float32."""
        output = item.output[0]
        low = with_inputs(item, [self._weight(item.input[0]), *item.input[1:]])
        low.output[0] = f"{output}.{self._element}"
        back = f"{item.name}/to_float32/Cast"
        return [low, node("Cast", [low.output[0]], output, back, to=ONNX_TYPES["float32"])]

    def _weight(self, name: str) -> str:
        """Return the weight in the low type; what is not float32 stays as it is."""
        if self._graph.weights[name].data_type != ONNX_TYPES["float32"]:
            return name
        key = f"{name}.{self._element}"
        if key not in self._graph.weights:
            values = self._graph.array(name)
            with np.errstate(over="ignore"):
                lowered = values.astype(numpy_type(self._element))
            if not np.isfinite(lowered.astype(np.float32)).all():
                self.overflows[name] = float(np.abs(values).max())
            self._graph.set_weight(key, lowered)
        return key


def _stays(item: onnx.NodeProto) -> bool:
    """Tell whether a node of the layers stays float32."""
    return item.op_type == "Softmax" or item.name.endswith(f"/{ATTENTION_SCORES}/Add")


def _raise_overflows(caster: _Caster) -> None:
    if caster.overflows:
        raise EngineError(
            "weights of this model do not fit into the precision",
            faults=[f"{name}: largest is {most:.3g}" for name, most in caster.overflows.items()],
            hint="build with --precision bf16 or fp32",
        )
