"""Round weights by what their products read, not each to its nearest step.

What rounding one input's weights leaves over is taken up by the inputs that are not rounded yet, as
far as the two go together in the activations: least squares in closed form, no gradients, about a
second for 384 x 1,536. What is stored has the same scales, types and sizes as before, so it costs
nothing at run time. Source: Frantar et al., GPTQ, arXiv:2210.17323.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ...arrays import Array, Float32
from ...bundle import SMOOTH
from .calibrate import Activations
from .graph import Graph
from .static import round_to

# Added to the diagonal, as a share of its mean: what calibration rows never showed stays in place.
DAMPING = 0.01
# Inputs whose leftovers are passed on together, by one matrix product.
BLOCK = 64


class Rounding:
    """Rounds the weights of one way of scaling, each once."""

    def __init__(self, seen: Mapping[str, Activations]):
        """Round by what the values of the float32 graph were `seen` to hold."""
        self._seen = seen
        self._done: dict[str, Array] = {}

    def __call__(
        self,
        graph: Graph,
        value: str,
        weight: str,
        scales: Float32,
        kind: np.dtype[Any],
        largest: float,
    ) -> Array:
        """Return the steps [K, N] of the type `kind` that stand for `weight` [K, N].

        Args:
            value: what the product reads, smoothed or not.
            scales: what a step of every weight is worth; broadcasts to [K, N].
            largest: the largest step.
        """
        if weight not in self._done:
            moments = self._moments(graph, value)
            self._done[weight] = round_by(moments, graph.array(weight), scales, kind, largest)
        return self._done[weight]

    def _moments(self, graph: Graph, value: str) -> Float32:
        """Return the second moments of `value`; a smoothed one's come from the one before."""
        if value in self._seen:
            return self._seen[value].moments
        moments = self._seen[value.removesuffix(f".{SMOOTH}")].moments
        (smoothing,) = (item for item in graph.nodes if value in item.output)
        factors = graph.array(smoothing.input[1])
        result: Float32 = moments * factors[:, None] * factors
        return result


def round_by(
    moments: Float32, weight: Float32, scales: Float32, kind: np.dtype[Any], largest: float
) -> Array:
    """Return the steps [K, N] that move the product least, over rows with these moments.

    Args:
        moments: sum of the products of two inputs over rows that are read, [K, K].
        weight: float32 [K, N].
        scales: what a step is worth; broadcasts to [K, N].
        kind: type of the steps.
        largest: the largest step.
    """
    # Those inputs first that say most: they find the most others to take up what they leave over.
    order = np.argsort(-moments.diagonal(), kind="stable")
    shares = _shares(moments[np.ix_(order, order)].astype(np.float64))
    left = weight[order].astype(np.float64)
    step = np.broadcast_to(scales, weight.shape)[order].astype(np.float64)
    steps = np.empty(weight.shape, kind)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        errors = np.empty((end - start, left.shape[1]))
        for row in range(start, end):
            rounded = round_to(left[row] / step[row], kind, largest)
            steps[order[row]] = rounded
            errors[row - start] = (left[row] - rounded.astype(np.float64) * step[row]) / shares[
                row, row
            ]
            left[row + 1 : end] -= np.outer(shares[row, row + 1 : end], errors[row - start])
        left[end:] -= shares[start:end, end:].T @ errors
    return steps


def _shares(moments: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return how much of each input's leftover every later one takes: upper triangular [K, K]."""
    damping = DAMPING * float(moments.diagonal().mean()) or 1.0  # 1: a value that is always 0
    damped = moments + damping * np.eye(len(moments))
    # The lower Cholesky factor of the reversed matrix, reversed, is an upper one of `damped`;
    # its inverse is the upper factor of the inverse.
    upper = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    result: npt.NDArray[np.float64] = np.linalg.inv(upper)
    return result
