"""8 bits with scales found while running: one a token and block of columns; weights likewise.

A static scale a tensor spends its steps on the few channels that stand out; these follow the
values, and trained models' scores move a fifth to a ninth as far.

What the pass adds, by name; the builds of the native engine and of OpenVINO's read it by these
names. VALUE is what a quantised linear reads, W its weight, B the columns of a block, `path` the
first linear that reads VALUE (`layers.0/query` for query, key and value, which share one; the last
layer's query reads the CLS rows alone and has nodes of its own, `layers.0/key` then being the
first; what they round is the same):

- `/path/dynamic/...`: float32 nodes that cut VALUE into blocks of B columns (the last one may be
  short), divide each by its largest |x| / 127 (int8) or / 448 (E4M3), round, and multiply it back.
  What comes out is `VALUE.dynamic`.
- `W.quantized`, int8 or float8_e4m3fn [K, N], and `W.scales`, float32 [ceil(K / B), N]; the
  nodes `/linear/dynamic/weight/...` make `W.dequantized` of them.
- Where the value was smoothed before (`calibrate.smooth`), VALUE and W end in `.smooth`, and
  `path.smooth`, float32 [K], holds what the channels are multiplied by.

The product of the two adds in float32, like the integer sums of each block times their scales.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...bundle import (
    DEQUANTIZED,
    DYNAMIC,
    QUANTIZED,
    SCALES,
    node_name,
    path_of_node,
    value_name,
)
from ..scales import BLOCK
from .float8 import round_to_float8
from .graph import Graph, node, with_inputs
from .lower import ONNX_TYPES, numpy_type
from .rounding import Rounding
from .static import LARGEST, Linear, each_node, find_linears, largest_weight, round_to

# Blocks of smaller values are zeros to every compute type; scales stay normal float32 numbers.
LEAST = 1e-30
SUMS_FLOAT32 = {DYNAMIC: "scales found while running, and the sums of 8-bit products"}


def dynamic_linears(graph: Graph, never: Collection[str] = ()) -> list[Linear]:
    """Return the linears that this form quantises: all but the parts `never` of a layer."""
    return [linear for linear in find_linears(graph) if linear.name.rpartition(".")[2] not in never]


def quantize_dynamic(
    graph: Graph,
    precision: str,
    *,
    keep: Collection[str] = (),
    never: Collection[str] = (),
    block: int = BLOCK,
    weight_bits: int = 8,
    rounding: Rounding | None = None,
) -> Graph:
    """Return the graph with all `dynamic_linears` quantised but those of the layer groups `keep`.

    Args:
        precision: `int8` or `fp8` (E4M3).
        never: parts of a layer that are not quantised, as `attention_output`.
        block: columns that share a scale; a last block may be shorter.
        weight_bits: bits of an int8 weight, its sign included.
        rounding: how weights are rounded; None: each to the nearest step.
    """
    new = graph.replaced([])
    largest = largest_weight(precision, weight_bits)
    writer = _Writer(new, graph, precision, block, largest, rounding)
    for item, linear in each_node(graph, dynamic_linears(graph, never), keep):
        if linear is None:
            new.nodes.append(item)
            continue
        path = f"{path_of_node(item.name)}/{DYNAMIC}"
        weight = writer.weight(linear, path)
        value = writer.activation(linear.value, path, len(graph.array(linear.weight)))
        new.nodes.append(with_inputs(item, [value, weight]))
    return new


class _Writer:
    """Adds the nodes and weights of this form to a graph, for each value and weight once."""

    def __init__(
        self,
        graph: Graph,
        source: Graph,
        precision: str,
        block: int,
        largest_weight: float,
        rounding: Rounding | None,
    ):
        self._graph, self._precision, self._block = graph, precision, block
        self._source, self._rounding = source, rounding
        self._largest, self._largest_weight = LARGEST[precision], largest_weight
        self._done: dict[str, str] = {}

    def activation(self, value: str, path: str, columns: int) -> str:
        """Quantise and dequantise `value` [..., columns] by nodes under `path`."""
        if value in self._done:
            return self._done[value]
        output = self._done[value] = f"{value}.{DYNAMIC}"
        num_blocks, width = -(-columns // self._block), min(columns, self._block)
        missing = num_blocks * width - columns
        last = self._constant("last_axis", np.array([-1], np.int64))
        if missing:  # zeros change no block's largest, and are cut off again
            pads = self._constant(f"pads.{missing}", np.array([0, missing], np.int64))
            value = self._add("Pad", [value, pads, "", last], path)
        blocks = np.array([-1, num_blocks, width], np.int64)
        shape = self._constant(f"blocks.{num_blocks}x{width}", blocks)
        cut = self._add("Reshape", [value, shape], path)
        scale = self._scale(cut, path, last)
        scaled = self._add("Mul", [self._rounded(cut, scale, path), scale], path)
        inputs = [scaled, self._add("Shape", [value], path)]
        if not missing:
            self._add("Reshape", inputs, f"{path}/back", output)
            return output
        whole = self._add("Reshape", inputs, f"{path}/back")
        first = self._constant("first", np.array([0], np.int64))
        end = self._constant(f"columns.{columns}", np.array([columns], np.int64))
        self._add("Slice", [whole, first, end, last], f"{path}/back", output)
        return output

    def weight(self, linear: Linear, path: str) -> str:
        """Store a weight [K, N] quantised, with its scales; dequantise it by nodes under `path`."""
        name = linear.weight
        values = self._graph.array(name)
        starts = np.arange(0, len(values), self._block)
        amax = np.maximum.reduceat(np.abs(values), starts, axis=0)
        scales = (np.maximum(amax, np.float32(LEAST)) / self._largest_weight).astype(np.float32)
        block_of_row = np.arange(len(values)) // self._block
        kind = numpy_type(self._precision)
        step, largest = scales[block_of_row], self._largest_weight
        if self._rounding is None:
            stored = round_to(values / step, kind, largest)
        else:
            stored = self._rounding(self._source, linear.value, name, step, kind, largest)
        quantized = self._graph.set_weight(f"{name}.{QUANTIZED}", stored)
        by_block = self._graph.set_weight(f"{name}.{SCALES}", scales)
        rows = self._constant(f"block_of_row.{len(values)}", block_of_row)
        path = f"{path}/weight"
        wide = self._add("Cast", [quantized], path, to=ONNX_TYPES["float32"])
        by_row = self._add("Gather", [by_block, rows], path, axis=0)
        return self._add("Mul", [wide, by_row], path, f"{name}.{DEQUANTIZED}")

    def _scale(self, blocks: str, path: str, last: str) -> str:
        """Return the scale of every block [..., 1]."""
        sizes = self._add("Abs", [blocks], path)
        amax = self._add("ReduceMax", [sizes, last], path, keepdims=1)
        least = self._constant("least", np.float32(LEAST))
        some = self._add("Max", [amax, least], path)
        largest = self._constant(f"largest.{self._precision}", np.float32(self._largest))
        return self._add("Div", [some, largest], f"{path}/scale")

    def _rounded(self, blocks: str, scale: str, path: str) -> str:
        """Return the blocks over their scales, rounded: the largest lands on the last step.

        As the native engine's kernels do: times the scale's reciprocal, which now and then is a
        step beside the quotient.
        """
        path = f"{path}/rounded"
        ratio = self._add("Mul", [blocks, self._add("Reciprocal", [scale], path)], path)
        if self._precision == "int8":
            return self._add("Round", [ratio], path)
        output, one = value_name(path, "Where"), self._constant("one", np.float32(1))
        whole = node("QuantizeLinear", [ratio, one], output, f"/{path}")
        self._graph.nodes += round_to_float8(self._graph, whole)
        return output

    def _add(
        self, kind: str, inputs: Sequence[str], path: str, output: str = "", **attributes: Any
    ) -> str:
        """Add a node at `path`; return its output, named after it where no name is given."""
        output = output or value_name(path, kind)
        self._graph.nodes.append(node(kind, inputs, output, node_name(path, kind), **attributes))
        return output

    def _constant(self, name: str, values: npt.ArrayLike) -> str:
        return self._graph.set_weight(f"const.{DYNAMIC}.{name}", np.asarray(values))
