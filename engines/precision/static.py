"""Scales fixed by calibration: explicit Q/DQ around the layers' linears, int8 or fp8 (E4M3).

Attention is never quantised. Activations have one symmetric scale a tensor; query, key and value
read one quantiser. int8 weights have a scale an output channel, fp8 weights one. Biases stay float:
TensorRT refuses int32 ones. Scales that are found while running: `dynamic.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...arrays import Array
from ...bundle import (
    DEQUANTIZED,
    QUANTIZED,
    group_of,
    layer_of,
    layer_path,
    linear_of,
    path_of_node,
)
from .graph import Graph, in_layers, node, with_inputs
from .lower import numpy_type

if TYPE_CHECKING:
    import onnx

    from .rounding import Rounding

LARGEST = {"int8": 127.0, "fp8": 448.0}


def largest_weight(precision: str, weight_bits: int = 8) -> float:
    """Return the largest |weight| stored: in `weight_bits` of them, sign included, for int8."""
    return 2.0 ** (weight_bits - 1) - 1 if precision == "int8" else LARGEST[precision]


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix product that can be quantised.

    Attributes:
        name: as `layers.3.ffn2`.
        group: its layer group, the name under which it is kept or quantised.
        value: its activation input.
        weight: its weight, [K, N].
    """

    name: str
    group: str
    value: str
    weight: str


def find_linears(graph: Graph) -> list[Linear]:
    """Return the layers' matrix products with weights, in the graph's order."""
    return [
        Linear(name := linear_of(item.name), group_of(name), item.input[0], item.input[1])
        for item in graph.nodes
        if item.op_type == "MatMul" and in_layers(item) and item.input[1] in graph.weights
    ]


def each_node(
    graph: Graph, linears: Iterable[Linear], keep: Collection[str]
) -> Iterator[tuple[onnx.NodeProto, Linear | None]]:
    """Go through a graph's nodes, each with the one of `linears` that it is, unless kept."""
    chosen = {linear.name: linear for linear in linears if linear.group not in keep}
    for item in graph.nodes:
        yield item, chosen.get(linear_of(item.name)) if item.op_type == "MatMul" else None


def quantize(
    graph: Graph,
    precision: str,
    amax: Mapping[str, float],
    *,
    keep: Collection[str] = (),
    scale_type: str = "float32",
    weight_bits: int = 8,
    rounding: Rounding | None = None,
) -> Graph:
    """Return the graph with Q/DQ around every linear but those of the layer groups `keep`.

    Args:
        precision: `int8` or `fp8`.
        amax: the largest |activation| that is still exact, for every linear's input value.
        scale_type: type that the scales will have in the end; values are rounded to it here, so
            that lowering the graph does not move them.
        weight_bits: bits of an int8 weight, its sign included.
        rounding: how weights are rounded; None: each to the nearest step.
    """
    new = graph.replaced([])
    writer = _Writer(new, graph, precision, np.dtype(scale_type), weight_bits, rounding)
    for item, linear in each_node(graph, find_linears(graph), keep):
        if linear is None:
            new.nodes.append(item)
            continue
        value = writer.activation(linear.value, amax[linear.value])
        new.nodes.append(with_inputs(item, [value, writer.weight(item, linear)]))
    return new


class _Writer:
    """Adds quantisers to a graph, each once."""

    def __init__(
        self,
        graph: Graph,
        source: Graph,
        precision: str,
        scale_type: np.dtype[Any],
        weight_bits: int,
        rounding: Rounding | None,
    ):
        self._graph, self._source, self._rounding = graph, source, rounding
        self._type = numpy_type(precision)
        self._largest = LARGEST[precision]
        self._largest_weight = largest_weight(precision, weight_bits)
        self._per_channel = precision == "int8"
        self._scale_type = scale_type
        self._done: dict[str, str] = {}

    def activation(self, value: str, amax: float) -> str:
        """Add Q and DQ behind `value`; return the dequantised value."""
        if value not in self._done:
            path = value.removesuffix("_output")
            # A node of the layers, whatever it reads: the passes that follow go by names.
            if layer_of(path) is None:
                path = f"/{layer_path(0)}{path}"
            scale, zero = self._parameters(path, self._scale(np.float32(amax), self._largest))
            quantized, output = f"{value}.{QUANTIZED}", f"{value}.{DEQUANTIZED}"
            self._graph.nodes += [
                node("QuantizeLinear", [value, scale, zero], quantized, f"{path}/QuantizeLinear"),
                node("DequantizeLinear", [quantized, scale, zero], output, f"{path}/Dequantize"),
            ]
            self._done[value] = output
        return self._done[value]

    def weight(self, item: onnx.NodeProto, linear: Linear) -> str:
        """Store a weight quantised and add its DQ; return the dequantised value."""
        name = linear.weight
        values = self._graph.array(name)
        amax = np.abs(values).max(axis=0 if self._per_channel else None)
        scale = self._scale(amax, self._largest_weight)
        step, largest = scale.astype(np.float32), self._largest_weight
        if self._rounding is None:
            stored = round_to(values / step, self._type, largest)
        else:
            stored = self._rounding(self._source, linear.value, name, step, self._type, largest)
        path = f"/{path_of_node(item.name)}"
        quantized = self._graph.set_weight(f"{name}.{QUANTIZED}", stored)
        inputs = [quantized, *self._parameters(f"{path}/weight", scale)]
        output = f"{name}.{DEQUANTIZED}"
        axis = {"axis": 1} if self._per_channel else {}
        path = f"{path}/weight/Dequantize"
        self._graph.nodes.append(node("DequantizeLinear", inputs, output, path, **axis))
        return output

    def _scale(self, amax: npt.ArrayLike, largest: float) -> Array:
        """Return the scale; a channel of zeros gets the smallest that is not zero."""
        least = np.finfo(self._scale_type).smallest_subnormal
        scale: Array = np.maximum(np.asarray(amax) / largest, least)
        return scale.astype(self._scale_type)

    def _parameters(self, path: str, scale: Array) -> tuple[str, str]:
        """Store scale (float32 for now) and zero point."""
        name = path.strip("/").replace("/", ".")
        zero = np.zeros(scale.shape, self._type)
        return (
            self._graph.set_weight(f"{name}.scale", scale.astype(np.float32)),
            self._graph.set_weight(f"{name}.zero_point", zero),
        )


def round_to(values: Array, kind: np.dtype[Any], largest: float) -> Array:
    """Round scaled values to the nearest of `kind`, ties to even, cut at +-`largest`."""
    cut = np.clip(values, -largest, largest)
    return (np.rint(cut) if kind == np.int8 else cut).astype(kind)
