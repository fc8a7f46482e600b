"""Which candidates a precise engine must score again: pure selection, no engine.

Three rules, one loop: score again what can still win, best fast score first, until the rule says
that nothing below can.

- By margin: the fast score lies at most so far below the precise one. The k-th best precise score
  seen so far can only rise, so an image whose fast score plus the margin lies below it can never
  reach the top k. What contradicts the margin widens it. Low scores may have a share of it: a
  scorer that saturates there errs less.
- By depth, for fast scores that tell little but an order: until `LOOKS_AGAIN` times as many were
  scored as stood before the deepest image that came among the top k, and `LEAST` more.
- By share: the best so many, in one round, whatever comes of it.

Source: the threshold algorithm (Fagin, Lotem, Naor, J. Comput. Syst. Sci. 66, 2003).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..arrays import Bool, Float32, Int64
from ..engines.agreement import LOOKS_AGAIN, SAFETY, shares_of_margin

Float64 = npt.NDArray[np.float64]

# Small rounds follow the rising threshold closely; smaller ones leave the engine half idle (CPU
# time a pair, demo scorer, OpenVINO float32 on two cores: 3.2 ms at 4 pairs, 2.5 at 16 and 32).
PAIRS_PER_ROUND = 16
WHOLE = ((math.inf, 1.0),)  # the same margin for all scores
LEAST = 150  # beside `LOOKS_AGAIN`: a few finds say little of how deep the next one stands


@dataclass(frozen=True, slots=True)
class Rule:
    """How survivors are chosen: by `margin`, by `share`, or by depth where both are None.

    Attributes:
        margin: raw logits by which a fast score may lie below the precise one.
        share: of the candidates, 0 to 1.
        slack: raw logits by which a score may lie below the k-th best and still count as one of
            the best: what the scores' own rounding can hide.
        levels: (fast score, share of the margin) each, both ascending: what holds up to that score,
            the last one for all above; empty: the whole margin for all.
    """

    margin: float | None = None
    share: float | None = None
    slack: float = 0.0
    levels: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, slots=True)
class Selection:
    """What `search` found, in the order of its candidates.

    Attributes:
        scores: float32 [N]: precise scores, NaN where there is none.
        rescored: bool [N]: which candidates the precise engine scored.
        margin: as given, or as widened; None where another rule chose.
        num_widened: how often a precise score contradicted the margin.
    """

    scores: Float32
    rescored: Bool
    margin: float | None
    num_widened: int


Search = Generator[Int64, Float32, Selection]


def search(
    fast: Float32, *, top_k: int, rule: Rule, pairs_per_round: int = PAIRS_PER_ROUND
) -> Search:
    """Ask for precise scores of what can be among the `top_k` best, `pairs_per_round` at a time.

    Yields positions in `fast`, int64 [M], is sent their precise scores, float32 [M] (what is not
    finite never counts as one of the best), and returns what came of it.

    By margin it is exact when no precise score exceeds its fast one by more than its share of it:
    the top k of `scores` are then those of the precise engine alone, ties included. Where no
    two scores differ by more than the margin either way, fewer than `pairs_per_round` candidates
    were scored needlessly.

    Args:
        fast: float32 [N]; a score that is not finite says nothing, so it is always rescored.
        top_k: how many of the best must be right, 1 or more.
    """
    finite = np.isfinite(fast)
    expected = np.where(finite, fast, np.nan).astype(np.float64)
    order = np.argsort(-np.where(finite, fast, np.inf), kind="stable")
    num_unknown = len(fast) - int(np.count_nonzero(finite))  # they come first
    by_rule = _search(rule, expected, num_unknown, top_k)
    precise = np.full(len(fast), np.nan, np.float32)
    num_done = num_known = 0
    threshold = -math.inf
    while True:
        most = max(pairs_per_round, top_k - num_known) if by_rule.in_rounds else len(fast)
        positions = by_rule.still_open(order[num_done : num_done + most], num_done, threshold)
        if not len(positions):
            break
        precise[positions] = yield positions
        num_done += len(positions)
        num_known, threshold = _kth_best(precise, top_k)
        by_rule.learn(precise, order[:num_done], threshold)
    rescored = np.zeros(len(fast), np.bool_)
    rescored[order[:num_done]] = True
    return Selection(precise, rescored, by_rule.margin, by_rule.num_widened)


class _Search(ABC):
    """A rule at work on one query's candidates.

    Attributes:
        in_rounds: what is scored can close what is open still, so little is asked for at once.
    """

    in_rounds = False
    margin: float | None = None
    num_widened = 0

    @abstractmethod
    def still_open(self, positions: Int64, num_before: int, threshold: float) -> Int64:
        """Return those that may be among the best; `num_before` stood before them."""

    def learn(self, precise: Float32, done: Int64, threshold: float) -> None:
        """Take in what was scored: `done` are positions, in the order of their fast scores."""
        return


class _ByMargin(_Search):
    in_rounds = True

    def __init__(self, rule: Rule, margin: float, expected: Float64):
        self.margin: float = margin
        self._expected, self._slack = expected, rule.slack
        self._shares = shares_of_margin(expected, rule.levels or WHOLE)

    def still_open(self, positions: Int64, num_before: int, threshold: float) -> Int64:
        most = self._expected[positions] + self.margin * self._shares[positions]
        hopeless = most < threshold - self._slack
        return positions[~hopeless]  # NaN is never below

    def learn(self, precise: Float32, done: Int64, threshold: float) -> None:
        wider = _widened(self.margin, (precise - self._expected) / self._shares)
        self.num_widened += wider > self.margin
        self.margin = wider


class _ByDepth(_Search):
    def __init__(self, slack: float, num_unknown: int, top_k: int):
        self._slack, self._num_unknown, self._deepest = slack, num_unknown, top_k

    def still_open(self, positions: Int64, num_before: int, threshold: float) -> Int64:
        if not math.isfinite(threshold) and num_before:
            return positions  # too few had a score
        ranked = max(LOOKS_AGAIN * self._deepest, self._deepest + LEAST)
        return positions[: max(0, self._num_unknown + ranked - num_before)]

    def learn(self, precise: Float32, done: Int64, threshold: float) -> None:
        among_best = np.flatnonzero(precise[done] >= threshold - self._slack)
        if len(among_best):
            ranked = int(among_best[-1]) + 1 - self._num_unknown
            self._deepest = max(self._deepest, ranked)


class _ByShare(_Search):
    def __init__(self, count: int):
        self._count = count

    def still_open(self, positions: Int64, num_before: int, threshold: float) -> Int64:
        return positions[: max(0, self._count - num_before)]


def _search(rule: Rule, expected: Float64, num_unknown: int, top_k: int) -> _Search:
    if rule.margin is not None:
        return _ByMargin(rule, rule.margin, expected)
    if rule.share is None:
        return _ByDepth(rule.slack, num_unknown, top_k)
    num_ranked = len(expected) - num_unknown
    return _ByShare(num_unknown + max(top_k, math.ceil(rule.share * num_ranked)))


def _kth_best(scores: Float32, k: int) -> tuple[int, float]:
    """Return how many scores are finite, and the k-th best; -inf where there are fewer."""
    finite = scores[np.isfinite(scores)]
    if len(finite) < k:
        return len(finite), -math.inf
    return len(finite), float(np.partition(finite, len(finite) - k)[-k])


def _widened(margin: float, differences: Float64) -> float:
    """Return `margin`, or more where the differences (precise - fast) contradict it.

    The images with the best fast scores are those it overrates, so their differences lean to one
    side: a spread beyond what `margin` allows tells of underrated images that nobody has seen
    yet. A constant offset has no spread; it costs its own size and no more.
    """
    finite = differences[np.isfinite(differences)]
    if not len(finite):
        return margin
    middle, largest = float(np.median(finite)), float(finite.max())
    if float(np.abs(finite - middle).max()) > 2 * margin:
        return max(margin, SAFETY * float(np.abs(finite).max()))
    if largest > margin:
        return largest + (SAFETY - 1) * (largest - middle)
    return margin
