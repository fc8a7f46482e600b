"""Fit the head of a shallow engine: ridge regression on what the whole float32 model says.

No labels, no training: one forward of the calibration pairs through the whole model gives its
logits and what a head can read after every layer; the head is then solved for.

Source: Hoerl and Kennard, Technometrics 12 (1970), pp. 55-67.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt

from ...arrays import Float32
from ...bundle import OUTPUT
from ..agreement import depth_shares
from ..contract import Batch, Progress
from ..precision.emulate import runner
from ..precision.graph import Graph
from .cut import Head, with_rows

Float64 = npt.NDArray[np.float64]

# Of the mean square of the rows' entries. Which one is chosen by queries that were not fitted on.
PENALTIES = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
NUM_FOLDS = 4
PAIRS_AT_ONCE = 32  # a forward's hidden states of all layers stay in the caches' reach


@dataclass(frozen=True, slots=True)
class Observed:
    """What the whole model made of the calibration pairs.

    Attributes:
        scores: one float32 [C] a query: raw logits.
        rows: number of layers -> one float32 [C, 3 H] a query: what a head reads there.
    """

    scores: Sequence[Float32]
    rows: Mapping[int, Sequence[Float32]]


@dataclass(frozen=True, slots=True)
class Fit:
    """A head and how well it does on queries that it was not fitted on.

    Attributes:
        head: fitted on all queries.
        penalty: of its weights, one of `PENALTIES`.
        correlation: with the whole model's scores, mean over the queries.
        depths: as `agreement.depth_shares`.
        scores: one float32 [C] a query, each by a head that never saw this query.
    """

    head: Head
    penalty: float
    correlation: float
    depths: Mapping[str, Mapping[str, float]]
    scores: Sequence[Float32]


def observe(
    graph: Graph, queries: Sequence[Iterable[Batch]], depths: Sequence[int], progress: Progress
) -> Observed:
    """Run the whole float32 `graph` once over `queries`; keep what a head of each depth reads."""
    wide, names = with_rows(graph, depths)
    run = runner(wide, [OUTPUT, *names])
    scores: list[Float32] = []
    rows: dict[int, list[Float32]] = {depth: [] for depth in depths}
    began = perf_counter()
    for number, batches in enumerate(queries):
        if number and number % 8 == 0:
            left = (perf_counter() - began) / number * (len(queries) - number)
            progress(f"fitting the head: query {number} of {len(queries)}, {left:.0f} s left")
        parts = [
            run(batch.part(slice(start, start + PAIRS_AT_ONCE)))
            for batch in batches
            for start in range(0, len(batch), PAIRS_AT_ONCE)
        ]
        found = [np.concatenate(values) for values in zip(*parts, strict=True)]
        scores.append(found[0])
        for depth, values in zip(depths, found[1:], strict=True):
            rows[depth].append(values)
    return Observed(scores, rows)


def fit_head(rows: Sequence[Float32], scores: Sequence[Float32]) -> Fit:
    """Fit a head to `scores`, one float32 [C] a query, by what it reads there, [C, 3 H] each.

    The penalty is the one that errs least on queries left out of the fit, a fourth at a time.
    """
    folds = min(NUM_FOLDS, len(rows))
    sums = [_Sums.of(rows[fold::folds], scores[fold::folds]) for fold in range(folds)]
    whole = _Sums.added(sums)
    best, left_out = np.inf, list(scores)
    chosen = PENALTIES[-1]
    for penalty in PENALTIES:
        heads = [(whole if folds == 1 else whole.without(part)).solved(penalty) for part in sums]
        found = [predicted(heads[number % folds], values) for number, values in enumerate(rows)]
        error = float(
            np.mean([np.square(a - b).mean() for a, b in zip(found, scores, strict=True)])
        )
        if error < best:
            best, chosen, left_out = error, penalty, found
    pairs = [(a, b) for a, b in zip(left_out, scores, strict=True) if len(a) > 1]
    correlations = [float(np.corrcoef(a, b)[0, 1]) for a, b in pairs if np.ptp(a) and np.ptp(b)]
    return Fit(
        whole.solved(chosen),
        chosen,
        float(np.mean(correlations)) if correlations else 0.0,
        depth_shares(scores, left_out),
        left_out,
    )


def predicted(head: Head, rows: Float32) -> Float32:
    """Return the scores of rows [C, 3 H]: float32 [C]."""
    scores: Float32 = (rows @ head.weight + np.float32(head.bias)).astype(np.float32)
    return scores


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over pairs that a ridge regression is solved from, in float64."""

    num_pairs: int
    x: Float64  # [K]
    y: float
    xx: Float64  # [K, K]
    xy: Float64  # [K]

    @classmethod
    def of(cls, rows: Sequence[Float32], scores: Sequence[Float32]) -> _Sums:
        x = np.concatenate(rows).astype(np.float64)
        y = np.concatenate(scores).astype(np.float64)
        return cls(len(y), x.sum(axis=0), float(y.sum()), x.T @ x, x.T @ y)

    @classmethod
    def added(cls, parts: Sequence[_Sums]) -> _Sums:
        return cls(
            sum(part.num_pairs for part in parts),
            np.sum([part.x for part in parts], axis=0),
            float(sum(part.y for part in parts)),
            np.sum([part.xx for part in parts], axis=0),
            np.sum([part.xy for part in parts], axis=0),
        )

    def without(self, part: _Sums) -> _Sums:
        return _Sums(
            self.num_pairs - part.num_pairs,
            self.x - part.x,
            self.y - part.y,
            self.xx - part.xx,
            self.xy - part.xy,
        )

    def solved(self, penalty: float) -> Head:
        """Return the head that errs least, its weights held small by `penalty`."""
        mean_x, mean_y = self.x / self.num_pairs, self.y / self.num_pairs
        spread = self.xx / self.num_pairs - np.outer(mean_x, mean_x)
        target = self.xy / self.num_pairs - mean_x * mean_y
        size = max(float(np.trace(self.xx)) / self.num_pairs / len(mean_x), 1e-12)
        spread[np.diag_indices_from(spread)] += penalty * size
        weight = np.linalg.solve(spread, target)
        return Head(weight.astype(np.float32), float(mean_y - mean_x @ weight))
