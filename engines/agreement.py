"""How two lists of scores agree: how far they lie apart, and who is ranked first. Pure measures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating[Any]]

RECALL_AT = (1, 5, 10)
# The largest difference of a few thousand pairs is not the largest there is.
SAFETY = 1.5
# How deep a shallow engine's order is searched (trained scorer of six layers, cut after 4 and 5, 50
# queries, 1,000 candidates, the top 10 wanted, simulated from float32 scores). Twice and 32: 94 to
# 98 % of the top tens are whole; three times and 100: 98 to 100 %. With 8-bit static scales the
# latter lost one image of one query in twelve, so it is four times and 150
# (`runtime/survivors.py`).
LOOKS_AGAIN = 4
TOP_K = (1, 2, 5, 10, 20)
RECALLS = (0.9, 0.95, 0.99, 1.0)
# Enough to set apart where a scorer saturates and nothing moves it; an eighth of the pairs each.
LEVELS = 8
# Calibration saw some hundred pairs a level: what none of them showed is not ruled out.
LEAST_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Agreement:
    """How two scorers of the same queries agree; all differences are of raw logits.

    Attributes:
        num_queries, num_pairs: what was scored; every query ranks its own candidates.
        max_abs_diff, mean_abs_diff: over all pairs.
        p99_abs_diff, p999_abs_diff: 99 % (99.9 %) of the pairs differ by no more.
        max_underrating: how far a score lies below the reference's at most, below 0 if none
            does; a cascade's margin comes from it.
        kendall_tau: tau-b between the two rankings, mean over the queries.
        top_1, top_10: share of the reference's best 1 (10) found among the other's best 1 (10).
        rescored: share of the candidates outside of the reference's best tenth that its scorer
            would have to look at again to be sure of that tenth, given `SAFETY` times
            `max_underrating`, for low scores a share of it (`error_levels`); mean over the queries.
    """

    num_queries: int
    num_pairs: int
    max_abs_diff: float
    mean_abs_diff: float
    p99_abs_diff: float
    p999_abs_diff: float
    max_underrating: float
    kendall_tau: float
    top_1: float
    top_10: float
    rescored: float


def rank_agreement(expected: Iterable[Scores], scores: Iterable[Scores]) -> Agreement:
    """Compare two lists of scores, one float [C] a query; C may differ between queries.

    A score that is not finite ranks last and differs by infinity.

    Raises:
        ValueError: no pairs, or lists of different lengths.
    """
    pairs = [_comparable(a, b) for a, b in zip(expected, scores, strict=True)]
    below = np.concatenate([a - b for a, b in pairs])
    diff = np.abs(below)
    high = np.quantile(diff, [0.99, 0.999], method="higher")
    margin, levels = SAFETY * max(float(below.max()), 0.0), _error_levels(pairs)
    return Agreement(
        num_queries=len(pairs),
        num_pairs=len(diff),
        max_abs_diff=float(diff.max()),
        mean_abs_diff=float(diff.mean()),
        p99_abs_diff=float(high[0]),
        p999_abs_diff=float(high[1]),
        max_underrating=float(below.max()),
        kendall_tau=float(np.mean([kendall_tau(a, b) for a, b in pairs])),
        top_1=float(np.mean([top_agreement(a, b, 1) for a, b in pairs])),
        top_10=float(np.mean([top_agreement(a, b, 10) for a, b in pairs])),
        rescored=float(np.mean([_rescored(a, b, margin, levels) for a, b in pairs])),
    )


def _rescored(expected: Scores, scores: Scores, margin: float, levels: list[list[float]]) -> float:
    """Return which share outside of the best tenth lies within `margin` of its last one."""
    k = max(1, len(expected) // 10)
    if len(expected) <= k:
        return 0.0
    last = np.partition(expected, len(expected) - k)[-k]
    with np.errstate(invalid="ignore"):  # what has no score is looked at: -inf + inf is not below
        hopeless = scores + margin * shares_of_margin(scores, levels) < last
    return float(max(0, np.count_nonzero(~hopeless) - k)) / (len(expected) - k)


def depth_shares(
    expected: Iterable[Scores], scores: Iterable[Scores]
) -> dict[str, dict[str, float]]:
    """Return how deep one must look into a ranking to find the best of another.

    Returns:
        k of `TOP_K` -> recall of `RECALLS` -> the share of the candidates, best first, that holds
        this share of the reference's k best; only k that are at most half of the candidates.
    """
    pairs = [_comparable(a, b) for a, b in zip(expected, scores, strict=True)]
    fewest = min(len(a) for a, _ in pairs)
    shares: dict[str, dict[str, float]] = {}
    for k in (k for k in TOP_K if 2 * k <= fewest):
        places = np.concatenate([_places(a, b, k) for a, b in pairs])
        deep = np.quantile(places, RECALLS, method="higher")
        shares[str(k)] = {f"{r:g}": float(at) for r, at in zip(RECALLS, deep, strict=True)}
    return shares


def error_levels(expected: Iterable[Scores], scores: Iterable[Scores]) -> list[list[float]]:
    """Return how much less low scores err than high ones.

    Returns:
        [score, share] each, ascending: no pair that scores at most `score` differs from the
        reference by more than `share` of the largest difference, nor lies below it by more than
        `share` of the largest underrating. Each holds as many pairs more as the one before.
    """
    return _error_levels([_comparable(a, b) for a, b in zip(expected, scores, strict=True)])


def _error_levels(pairs: Sequence[tuple[Scores, Scores]]) -> list[list[float]]:
    found = np.concatenate([b for _, b in pairs])
    order = np.argsort(found, kind="stable")
    with np.errstate(invalid="ignore"):  # no score at all: what it differs by is not finite
        found, below = found[order], np.concatenate([a - b for a, b in pairs])[order]
        errors = np.abs(below), np.maximum(below, 0.0)
        so_far = [np.maximum.accumulate(each) for each in errors]
        shares = [each / each[-1] for each in so_far if 0 < each[-1] < np.inf]
    share = np.max(shares or [np.ones(len(found))], axis=0)
    up_to = found[-(-len(found) * np.arange(1, LEVELS + 1) // LEVELS) - 1]
    last = np.searchsorted(found, up_to, side="right") - 1
    levels: list[list[float]] = np.stack([up_to, share[last]], axis=1).tolist()
    return levels


def shares_of_margin(scores: Scores, levels: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    """Return which share of a margin scores [N] have, by levels as of `error_levels`."""
    up_to, shares = np.array(levels).T
    level = np.minimum(np.searchsorted(up_to, scores), len(shares) - 1)  # NaN is above all
    found: npt.NDArray[np.float64] = np.maximum(LEAST_SHARE, shares[level])
    return found


def _places(expected: Scores, scores: Scores, k: int) -> npt.NDArray[np.float64]:
    """Return where the `k` best of `expected` stand in `scores`: shares of its length, 0 to 1."""
    place = np.empty(len(scores), np.float64)
    place[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    best = np.argsort(-expected, kind="stable")[:k]
    return place[best] / len(scores)


def _comparable(expected: Scores, scores: Scores) -> tuple[Scores, Scores]:
    """Return both as float64 [C], the latter with -inf where they are not finite."""
    if expected.shape != scores.shape:
        raise ValueError(f"scores of one query are {expected.shape} and {scores.shape}")
    wide = scores.astype(np.float64)
    return expected.astype(np.float64), np.where(np.isfinite(wide), wide, -np.inf)


def kendall_tau(first: Scores, second: Scores) -> float:
    """Return Kendall's tau-b of two score lists [N]; 1.0 where neither orders anything.

    Takes O(n log n): a token store ranks thousands. Source: Knight, JASA 61 (1966), pp. 436-439.
    """
    num_pairs = len(first) * (len(first) - 1) // 2
    a = np.unique(first, return_inverse=True)[1].reshape(-1).astype(np.int64)
    b = np.unique(second, return_inverse=True)[1].reshape(-1).astype(np.int64)
    ordered_a, ordered_b = num_pairs - _num_ties(a), num_pairs - _num_ties(b)
    if ordered_a == 0 or ordered_b == 0:
        return float(ordered_a == ordered_b)
    ties_of_both = _num_ties(a * len(b) + b)
    discordant = _num_inversions(b[np.lexsort((b, a))])
    net = ordered_a + ordered_b - num_pairs + ties_of_both - 2 * discordant
    return float(net / np.sqrt(float(ordered_a) * float(ordered_b)))


def _num_ties(ranks: npt.NDArray[np.int64]) -> int:
    """Count the pairs of equal ranks."""
    counts = np.unique(ranks, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


def _num_inversions(ranks: npt.NDArray[np.int64]) -> int:
    """Count the pairs i < j with ranks[i] > ranks[j]: a radix sort from the highest bit down.

    Two ranks part at the highest bit in which they differ; there, the earlier one has a 1.
    """
    total = 0
    for bit in reversed(range(int(ranks.max()).bit_length())):
        ones = (ranks >> bit) & 1
        ones_before = np.cumsum(ones) - ones
        group = ranks >> (bit + 1)
        begin = np.searchsorted(group, group)
        total += int(((ones_before - ones_before[begin]) * (1 - ones)).sum())
        ranks = ranks[np.argsort(ranks >> bit, kind="stable")]
    return total


def top_agreement(expected: Scores, scores: Scores, k: int) -> float:
    """Return the share of the `k` best of `expected` that are among the `k` best of `scores`."""
    k = min(k, len(expected))
    best = [set(np.argsort(-s, kind="stable")[:k].tolist()) for s in (expected, scores)]
    return len(best[0] & best[1]) / k


def recall(scores: Iterable[Scores], targets: Iterable[int | None]) -> dict[str, float] | None:
    """Return {"R@1": share, ...}: queries whose target is among the first 1, 5, 10 of a ranking.

    Ties keep the order of the candidates. None where no query knows its target.
    """
    ranks = [
        int((s > s[target]).sum() + (s[:target] == s[target]).sum())
        for s, target in zip(scores, targets, strict=True)
        if target is not None
    ]
    if not ranks:
        return None
    return {f"R@{k}": sum(rank < k for rank in ranks) / len(ranks) for k in RECALL_AT}
