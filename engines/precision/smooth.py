"""Move outlier channels from activations into weights: exact in float32, kind to int8 and fp8.

A few channels of a LayerNorm's output can be twenty times the others; one scale a tensor then
leaves the others a handful of steps. Each channel j of a linear's input is divided by s_j and the
weight's row j multiplied by it: s_j = sqrt(largest |x_j| / largest |w_j|) (SmoothQuant, arXiv
2211.10438, with alpha 0.5). The residual reads the undivided value, so the division is a node of
its own; engines fold it into the quantiser.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..contract import Float32
from .calibrate import Activations
from .graph import Graph, node, with_inputs
from .quantize import Linear, find_linears

# Largest channel over the median one. Gaussian channels stay below 2 (seen: random full-size
# weights 1.6); smoothing where nothing stands out would only cost a multiplication.
OUTLIER_RATIO = 6.0


def outlier_values(seen: Mapping[str, Activations]) -> dict[str, float]:
    """Return the values with outlier channels, and their ratio of largest to median channel."""
    ratios = {name: _ratio(values.channel_amax) for name, values in seen.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio > OUTLIER_RATIO}


def smooth(graph: Graph, seen: Mapping[str, Activations]) -> Graph:
    """Return an equal graph in which the inputs of linears with outlier channels are even."""
    readers: dict[str, list[Linear]] = {}
    for linear in find_linears(graph):
        readers.setdefault(linear.value, []).append(linear)
    factors = {
        name: _factors(graph, seen[name].channel_amax, readers[name])
        for name in outlier_values(seen)
    }
    new = graph.replaced([])
    weights = {linear.weight: linear.value for linear in find_linears(graph)}
    done: dict[str, str] = {}
    for item in graph.nodes:
        value = weights.get(item.input[1]) if item.op_type == "MatMul" else None
        if value is None or value not in factors:
            new.nodes.append(item)
            continue
        if value not in done:
            done[value] = _divide(new, item.name, value, factors[value])
        rows = new.array(item.input[1]) * factors[value][:, None]
        weight = new.set_weight(f"{item.input[1]}.smooth", rows)
        new.nodes.append(with_inputs(item, [done[value], weight]))
    return new


def _divide(graph: Graph, reader: str, value: str, factors: Float32) -> str:
    """Add the division of `value`, named after the first linear that reads it."""
    path = reader.rsplit("/", 1)[0]
    stored = graph.set_weight(f"{path.strip('/').replace('/', '.')}.smooth", 1 / factors)
    output = f"{value}.smooth"
    graph.nodes.append(node("Mul", [value, stored], output, f"{path}/smooth/Mul"))
    return output


def _factors(graph: Graph, channel_amax: Float32, readers: list[Linear]) -> Float32:
    """Return s [K]; channels that never speak keep 1."""
    rows = np.max([np.abs(graph.array(linear.weight)).max(axis=1) for linear in readers], axis=0)
    silent = (channel_amax == 0) | (rows == 0)
    ratio = np.where(silent, 1.0, channel_amax) / np.where(silent, 1.0, rows)
    factors = np.sqrt(ratio, dtype=np.float32)
    result: Float32 = np.where(silent, 1.0, factors / np.median(factors)).astype(np.float32)
    return result


def _ratio(channel_amax: Float32) -> float:
    return float(channel_amax.max() / max(float(np.median(channel_amax)), 1e-30))
