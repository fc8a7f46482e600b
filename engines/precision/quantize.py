"""Explicit Q/DQ around the layers' linears: int8, or fp8 (E4M3). Attention is never quantised.

Activations: symmetric, one scale a tensor; query, key and value read one quantiser. Weights: int8
with a scale an output channel, fp8 with one scale. Biases stay float: TensorRT refuses int32 ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...arrays import Array
from ...bundle import group_of, layer_of, layer_path, linear_of, path_of_node
from .graph import Graph, linears, node, with_inputs

if TYPE_CHECKING:
    import onnx

LARGEST = {"int8": 127.0, "fp8": 448.0}


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
    """Return what can be quantised, in the graph's order."""
    return [
        Linear(linear_of(item.name), group_of(linear_of(item.name)), item.input[0], item.input[1])
        for item in linears(graph)
    ]


def quantize(
    graph: Graph,
    precision: str,
    amax: Mapping[str, float],
    *,
    keep: Collection[str] = (),
    scale_type: str = "float32",
) -> Graph:
    """Return the graph with Q/DQ around every linear but those of the layer groups `keep`.

    Args:
        precision: `int8` or `fp8`.
        amax: the largest |activation| that is still exact, for every linear's input value.
        scale_type: type that the scales will have in the end; values are rounded to it here, so
            that lowering the graph does not move them.
    """
    new = graph.replaced([])
    writer = _Writer(new, precision, np.dtype(scale_type))
    chosen = {linear.name: linear for linear in find_linears(graph) if linear.group not in keep}
    for item in graph.nodes:
        linear = chosen.get(linear_of(item.name)) if item.op_type == "MatMul" else None
        if linear is None or item.input[1] != linear.weight:
            new.nodes.append(item)
            continue
        value = writer.activation(linear.value, amax[linear.value])
        new.nodes.append(with_inputs(item, [value, writer.weight(item, linear.weight)]))
    return new


class _Writer:
    """Adds quantisers to a graph, each once."""

    def __init__(self, graph: Graph, precision: str, scale_type: np.dtype[Any]):
        self._graph = graph
        self._type = storage_type(precision)
        self._largest = LARGEST[precision]
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
            scale, zero = self._parameters(path, self._scale(np.float32(amax)))
            quantized, output = f"{value}.quantized", f"{value}.dequantized"
            self._graph.nodes += [
                node("QuantizeLinear", [value, scale, zero], quantized, f"{path}/QuantizeLinear"),
                node("DequantizeLinear", [quantized, scale, zero], output, f"{path}/Dequantize"),
            ]
            self._done[value] = output
        return self._done[value]

    def weight(self, item: onnx.NodeProto, name: str) -> str:
        """Store a weight quantised and add its DQ; return the dequantised value."""
        values = self._graph.array(name)
        scale = self._scale(np.abs(values).max(axis=0 if self._per_channel else None))
        stored = round_to(values / scale.astype(np.float32), self._type, self._largest)
        path = f"/{path_of_node(item.name)}"
        quantized = self._graph.set_weight(f"{name}.quantized", stored)
        inputs = [quantized, *self._parameters(f"{path}/weight", scale)]
        output = f"{name}.dequantized"
        axis = {"axis": 1} if self._per_channel else {}
        path = f"{path}/weight/Dequantize"
        self._graph.nodes.append(node("DequantizeLinear", inputs, output, path, **axis))
        return output

    def _scale(self, amax: npt.ArrayLike) -> Array:
        """Return the scale; a channel of zeros gets the smallest that is not zero."""
        least = np.finfo(self._scale_type).smallest_subnormal
        scale: Array = np.maximum(np.asarray(amax) / self._largest, least)
        return scale.astype(self._scale_type)

    def _parameters(self, path: str, scale: Array) -> tuple[str, str]:
        """Store scale (float32 for now) and zero point."""
        name = path.strip("/").replace("/", ".")
        zero = np.zeros(scale.shape, self._type)
        return (
            self._graph.set_weight(f"{name}.scale", scale.astype(np.float32)),
            self._graph.set_weight(f"{name}.zero_point", zero),
        )


def storage_type(precision: str) -> np.dtype[Any]:
    """Return the NumPy type of quantised values; fp8 is `ml_dtypes`' float8_e4m3fn."""
    if precision == "int8":
        return np.dtype(np.int8)
    import ml_dtypes

    kind: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
    return kind


def round_to(values: Array, kind: np.dtype[Any], largest: float) -> Array:
    """Round scaled values to the nearest of `kind`, ties to even, cut at +-`largest`."""
    cut = np.clip(values, -largest, largest)
    return (np.rint(cut) if kind == np.int8 else cut).astype(kind)
