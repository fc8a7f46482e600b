"""Look at the activations that would be quantised, and choose how far each scale reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...arrays import Array, Float32
from ...bundle import SMOOTH, node_name, path_of_node, weight_name
from ..contract import Batch
from .emulate import runner
from .graph import Graph, node, with_inputs
from .lower import numpy_type
from .static import LARGEST, Linear, find_linears, round_to

# Largest channel over the median one. Gaussian channels stay below 2 (seen: random full-size
# weights 1.6); smoothing where nothing stands out would only cost a multiplication.
OUTLIER_RATIO = 6.0


def outlier_values(
    seen: Mapping[str, Activations], least: float = OUTLIER_RATIO
) -> dict[str, float]:
    """Return the values with outlier channels, and their ratio of largest to median channel.

    Args:
        least: ratio from which on a channel stands out.
    """
    ratios = {name: _ratio(values.channel_amax) for name, values in seen.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio > least}


def smooth(graph: Graph, seen: Mapping[str, Activations], least: float = OUTLIER_RATIO) -> Graph:
    """Return an equal graph in which the inputs of linears with outlier channels are even.

    Args:
        seen: the values to look at; others stay as they are.
        least: as of `outlier_values`.
    """
    readers: dict[str, list[Linear]] = {}
    for linear in find_linears(graph):
        readers.setdefault(linear.group, []).append(linear)
    group_of_value = {linear.value: linear.group for linear in find_linears(graph)}
    factors = {
        name: _factors(graph, seen[name].channel_amax, readers[group_of_value[name]])
        for name in outlier_values(seen, least)
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
        weight = new.set_weight(f"{item.input[1]}.{SMOOTH}", rows)
        new.nodes.append(with_inputs(item, [done[value], weight]))
    return new


def _divide(graph: Graph, reader: str, value: str, factors: Float32) -> str:
    """Add the division of `value`, named after the first linear that reads it."""
    path = path_of_node(reader)
    stored = graph.set_weight(weight_name(path, SMOOTH), 1 / factors)
    output = f"{value}.{SMOOTH}"
    graph.nodes.append(node("Mul", [value, stored], output, node_name(f"{path}/{SMOOTH}", "Mul")))
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


# Slots whose rows tell how channels go together: all of 256 pairs would take a full-size model's
# calibration most of a minute. The first, CLS, is one of them.
ROW_STEP = 3
# A bin is the sign-less float32 without its low 17 bits: 64 bins an octave, every float has one.
_LOW_BITS = 17
_NUM_BINS = 1 << (31 - _LOW_BITS)
# Cut-offs that the MSE search tries, as shares of the largest value.
_SHARES = np.geomspace(1.0, 0.02, 40)


@dataclass(slots=True)
class Activations:
    """What one value of the graph was seen to hold.

    Attributes:
        channel_amax: float32 [K]: the largest |x| of each channel.
        counts: int64 [bins]: how many |x| fell into each logarithmic bin.
        moments: float32 [K, K]: sums of x xT over some of the rows.
    """

    channel_amax: Float32
    counts: npt.NDArray[np.int64]
    moments: Float32

    @classmethod
    def none(cls, channels: int) -> Activations:
        """Return what is known of `channels` channels before anything was seen."""
        empty = np.zeros(_NUM_BINS, np.int64), np.zeros((channels, channels), np.float32)
        return cls(np.zeros(channels, np.float32), *empty)

    @property
    def amax(self) -> float:
        """The largest |x|."""
        return float(self.channel_amax.max())

    def add(self, values: Float32) -> None:
        """Take in `values` [..., K]."""
        magnitude = np.abs(values.reshape(-1, values.shape[-1]))
        np.maximum(self.channel_amax, magnitude.max(axis=0), out=self.channel_amax)
        bins = magnitude.view(np.uint32).ravel() >> _LOW_BITS
        self.counts += np.bincount(bins, minlength=_NUM_BINS)
        rows = values[..., :: ROW_STEP if values.shape[-2] > 1 else 1, :]
        rows = rows.reshape(-1, values.shape[-1])
        self.moments += rows.T @ rows


def observe(graph: Graph, batches: Iterable[Batch]) -> dict[str, Activations]:
    """Return what the input of every linear of the float32 `graph` holds over `batches`."""
    names = list(dict.fromkeys(linear.value for linear in find_linears(graph)))
    run = runner(graph, names)
    seen: dict[str, Activations] = {}
    for batch in batches:
        for name, values in zip(names, run(batch), strict=True):
            if name not in seen:
                seen[name] = Activations.none(values.shape[-1])
            seen[name].add(values)
    return seen


def shared_by_groups(graph: Graph, seen: Mapping[str, Activations]) -> dict[str, Activations]:
    """Return `seen` with all values that a layer group reads as one.

    In the last layer the query reads one row a pair, and key and value read all.
    """
    values: dict[str, list[Activations]] = {}
    for linear in find_linears(graph):
        values.setdefault(linear.group, []).append(seen[linear.value])
    shared = {
        group: Activations(
            np.max([each.channel_amax for each in read], axis=0),
            np.sum([each.counts for each in read], axis=0),
            np.sum([each.moments for each in read], axis=0),
        )
        for group, read in values.items()
    }
    return {linear.value: shared[linear.group] for linear in find_linears(graph)}


def by_max(seen: Activations, precision: str) -> float:
    """Nothing is cut off."""
    return seen.amax


def by_percentile(seen: Activations, precision: str) -> float:
    """One value of ten thousand is cut off."""
    order = np.cumsum(seen.counts)
    cut = int(np.searchsorted(order, 0.9999 * order[-1]))
    return min(seen.amax, float(_centers()[cut])) or seen.amax


def by_mse(seen: Activations, precision: str) -> float:
    """The squared error of rounding and cutting off together is least."""
    used = np.flatnonzero(seen.counts)
    centers, counts = _centers()[used], seen.counts[used].astype(np.float64)
    cuts = seen.amax * _SHARES
    errors = [float(counts @ (centers - _rounded(centers, cut, precision)) ** 2) for cut in cuts]
    return float(cuts[int(np.argmin(errors))])


METHODS: Mapping[str, Callable[[Activations, str], float]] = {
    "max": by_max,
    "percentile 99.99": by_percentile,
    "mse": by_mse,
}


def amax_by(method: str, seen: Mapping[str, Activations], precision: str) -> dict[str, float]:
    """Return the largest |x| that stays exact for every value, chosen by `method`."""
    return {name: METHODS[method](values, precision) for name, values in seen.items()}


def _rounded(values: Array, amax: float, precision: str) -> Array:
    scale = max(amax, 1e-30) / LARGEST[precision]
    rounded = round_to(values / scale, numpy_type(precision), LARGEST[precision])
    result: Array = rounded.astype(np.float64) * scale
    return result


def _centers() -> npt.NDArray[np.float64]:
    """Return the middle of every bin."""
    bits = (np.arange(_NUM_BINS, dtype=np.uint32) << _LOW_BITS) + (1 << (_LOW_BITS - 1))
    with np.errstate(invalid="ignore"):
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
