"""A graph in lower precision, typed value by value: nothing is left to an engine's choice.

`lower`: the layers in float16 or bfloat16. Embeddings and their norms stay float32 (raw visual
tokens may be large), and so do mask and softmax, pooler and classifier; LayerNorm keeps its
statistics in float32 by its `stash_type`.

`lower_operands`: float32, but for what our own kernels read or write in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ...bundle import (
    ATTENTION_SCORES,
    SMOOTH,
    WORD_EMBEDDINGS,
    node_name,
)
from ...errors import EngineError
from .graph import Graph, in_layers, is_dynamic, node, with_inputs

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


Lowering = Callable[["Graph", str], "Graph"]


def lower(graph: Graph, element: str) -> Graph:
    """Return the graph with the layers in `element` (`float16` or `bfloat16`).

    Raises:
        EngineError: weights larger than the type takes (all named).
    """
    new = graph.replaced([])
    caster = _Caster(new, element)
    staying = _staying(graph)
    for item in graph.nodes:
        if element == "float16" and item.name == WORD_GATHER:
            new.nodes += caster.gather_low(item)
            continue
        low = in_layers(item) and item.name not in staying
        inputs = [caster.take(name, low) for name in item.input]
        new.nodes.append(with_inputs(item, inputs))
        if low and item.op_type != "QuantizeLinear":
            caster.low.update(item.output)
        elif item.op_type == "QuantizeLinear":
            caster.untouched.update(item.output)
    caster.raise_overflows()
    return new


OPERANDS_ONLY = {
    "everything but operands": "biases, GELU, residual sums, norms: kernels add before they round"
}


def lower_operands(graph: Graph, element: str) -> Graph:
    """Return the graph in float32, but for the operands of the layers' products, in `element`.

    Operands of residual sums are those of products, too. So our own kernels compute: what follows
    a product is done in float32, and rounded when it is stored. Values in 8 bits stay as they are.

    Raises:
        EngineError: weights larger than the type takes (all named).
    """
    new = graph.replaced([])
    rounder = _Rounder(new, element)
    read = _operands(graph)
    sums: dict[str, str] = {}
    for item in graph.nodes:
        if item.op_type == "Softmax" and in_layers(item):
            sums[item.output[0]] = _add_exponents(new, item)
            continue
        has_weight = in_layers(item) and item.op_type == "MatMul" and not is_dynamic(item)
        inputs = [
            rounder.weight(name, keep_float32=True)
            if has_weight and name in graph.weights
            else rounder.take(name, name in read)
            for name in item.input
        ]
        if item.op_type == "MatMul" and item.input[0] in sums:
            new.nodes += _divided(with_inputs(item, inputs), sums[item.input[0]])
        else:
            new.nodes.append(with_inputs(item, inputs))
    rounder.raise_overflows()
    return new


def _add_exponents(graph: Graph, item: onnx.NodeProto) -> str:
    """Add a Softmax that is not divided by its sums yet; return these.

    Kernels round so, and divide what the values add up to.
    """
    (scores,), (output,) = item.input, item.output
    last = graph.set_weight("const.last_axis", np.array([-1], np.int64))
    largest, below, total = (f"{output}.{name}" for name in ("largest", "below", "total"))
    graph.nodes += [
        node("ReduceMax", [scores, last], largest, f"{item.name}/ReduceMax", keepdims=1),
        node("Sub", [scores, largest], below, f"{item.name}/Sub"),
        node("Exp", [below], output, f"{item.name}/Exp"),
        node("ReduceSum", [output, last], total, f"{item.name}/ReduceSum", keepdims=1),
    ]
    return total


def _divided(product: onnx.NodeProto, total: str) -> list[onnx.NodeProto]:
    """Return a product and its division by `total`."""
    output, whole = product.output[0], f"{product.output[0]}.whole"
    product.output[0] = whole
    return [product, node("Div", [whole, total], output, f"{product.name}/Div")]


def _operands(graph: Graph) -> set[str]:
    """Return the values that kernels hold in 16 bits."""
    read: set[str] = set()
    makers = {name: item for item in graph.nodes for name in item.output}
    for item in filter(in_layers, graph.nodes):
        values = [name for name in item.input if name not in graph.weights]
        is_sum = item.op_type == "Add" and not item.name.endswith(f"/{ATTENTION_SCORES}/Add")
        if item.op_type == "LayerNormalization":
            read.update(item.output)  # the last one's, too, which no product of a layer reads
        elif item.op_type == "Gelu":
            sums = makers[item.input[0]]
            if not any(is_dynamic(makers[name]) for name in sums.input if name in makers):
                read.update(item.output)
        elif (item.op_type == "MatMul" and not is_dynamic(item)) or (is_sum and len(values) == 2):
            read.update(values)
    return read


def numpy_type(element: str) -> np.dtype[Any]:
    """Return the NumPy type of an element: a name of ONNX, `int8` or `fp8`."""
    if element not in ("bfloat16", "fp8"):
        return np.dtype(element)
    import ml_dtypes

    kind: np.dtype[Any] = np.dtype(
        ml_dtypes.bfloat16 if element == "bfloat16" else ml_dtypes.float8_e4m3fn
    )
    return kind


class _Caster:
    """Gives nodes their inputs in the type they want, each value cast once."""

    def __init__(self, graph: Graph, element: str):
        self._graph = graph
        self._element = element
        self._cast: set[str] = set()
        self.low: set[str] = set()
        self.untouched: set[str] = set()  # quantised integers
        self._overflows: dict[str, float] = {}

    def take(self, name: str, low: bool) -> str:
        """Return the name under which a node finds the value `name` in the type it wants."""
        if name in self._graph.weights:
            return self.weight(name) if low else name
        if name in self.untouched or (name in self.low) == low:
            return name
        element = self._element if low else "float32"
        key = f"{name}.{element}"
        if key not in self._cast:
            path = f"{name.removesuffix('_output')}/to_{element}/Cast"
            self._graph.nodes.append(node("Cast", [name], key, path, to=ONNX_TYPES[element]))
            self._cast.add(key)
        return key

    def gather_low(self, item: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the gather from the table in the low type, and the cast back to float32."""
        output = item.output[0]
        low = with_inputs(item, [self.weight(item.input[0]), *item.input[1:]])
        low.output[0] = f"{output}.{self._element}"
        back = f"{item.name}/to_float32/Cast"
        return [low, node("Cast", [low.output[0]], output, back, to=ONNX_TYPES["float32"])]

    def weight(self, name: str, *, keep_float32: bool = False) -> str:
        """Return the weight in the low type; what is not float32 stays as it is.

        `keep_float32` only rounds it.
        """
        if self._graph.weights[name].data_type != ONNX_TYPES["float32"]:
            return name
        key = f"{name}.{self._element}"
        if key not in self._graph.weights:
            values = self._graph.array(name)
            with np.errstate(over="ignore"):
                lowered = values.astype(numpy_type(self._element))
            if not np.isfinite(lowered.astype(np.float32)).all():
                self._overflows[name] = float(np.abs(values).max())
            self._graph.set_weight(key, lowered.astype(np.float32) if keep_float32 else lowered)
        return key

    def raise_overflows(self) -> None:
        """Refuse weights that the type cannot hold."""
        if self._overflows:
            found = self._overflows.items()
            raise EngineError(
                "weights of this model do not fit into the precision",
                faults=[f"{name}: largest is {most:.3g}" for name, most in found],
                hint="build with --precision bf16 or fp32",
            )


class _Rounder(_Caster):
    """Gives nodes their inputs in float32, some of them rounded to the low type."""

    def take(self, name: str, low: bool) -> str:
        if not low:
            return name
        rounded = super().take(name, True)
        key = f"{name}.rounded"
        if key not in self._cast:
            path = f"{name.removesuffix('_output')}/to_float32/Cast"
            back = node("Cast", [rounded], key, path, to=ONNX_TYPES["float32"])
            self._graph.nodes.append(back)
            self._cast.add(key)
        return key


def _staying(graph: Graph) -> set[str]:
    """Return the nodes of the layers that stay float32: all that scales found running touch, too.

    The real products add in float32, and a rounded factor would round what was just quantised.
    """
    read = {name for item in graph.nodes if is_dynamic(item) for name in item.input}
    smoothing = f"/{SMOOTH}/Mul"
    return {
        item.name
        for item in graph.nodes
        if item.op_type == "Softmax"
        or item.name.endswith(f"/{ATTENTION_SCORES}/Add")
        or is_dynamic(item)
        or (item.name.endswith(smoothing) and item.output[0] in read)
    }
