"""Look at the activations that would be quantised, and choose how far each scale reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..contract import Array, Batch, Float32
from .emulate import runner
from .graph import Graph
from .quantize import LARGEST, find_linears, round_to, storage_type

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
    """

    channel_amax: Float32
    counts: npt.NDArray[np.int64]

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


def observe(graph: Graph, batches: Iterable[Batch]) -> dict[str, Activations]:
    """Return what the input of every linear of the float32 `graph` holds over `batches`."""
    names = list(dict.fromkeys(linear.value for linear in find_linears(graph)))
    run = runner(graph, names)
    seen: dict[str, Activations] = {}
    for batch in batches:
        for name, values in zip(names, run(batch), strict=True):
            if name not in seen:
                channels = values.shape[-1]
                empty = np.zeros(_NUM_BINS, np.int64)
                seen[name] = Activations(np.zeros(channels, np.float32), empty)
            seen[name].add(values)
    return seen


def by_max(seen: Activations, precision: str) -> float:
    """Nothing is cut off."""
    return seen.amax


def by_percentile(seen: Activations, precision: str) -> float:
    """One value of ten thousand is cut off."""
    order = np.cumsum(seen.counts)
    place = int(np.searchsorted(order, 0.9999 * order[-1]))
    return min(seen.amax, float(_centers()[place])) or seen.amax


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
    rounded = round_to(values / scale, storage_type(precision), LARGEST[precision])
    result: Array = rounded.astype(np.float64) * scale
    return result


def _centers() -> npt.NDArray[np.float64]:
    """Return the middle of every bin."""
    bits = (np.arange(_NUM_BINS, dtype=np.uint32) << _LOW_BITS) + (1 << (_LOW_BITS - 1))
    with np.errstate(invalid="ignore"):
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
