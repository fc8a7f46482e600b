"""Calibration pairs and what scoring them takes: some queries to compare by, all for the last word.

Comparing needs few pairs; only what is taken must hold on all of them. Every line of progress says
how long the rest may take, from the pace of the scoring before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np

from ...arrays import Float32
from ..agreement import Agreement, rank_agreement
from ..contract import Batch, Progress
from .emulate import scorer
from .graph import Graph

Query = Sequence[Batch]  # one query's candidates, cut into batches
Score = Callable[[Batch], Float32]

# Whole queries to compare by: enough pairs that tau moves by less than two ways differ, and enough
# queries that no single one decides.
COMPARED_PAIRS, COMPARED_QUERIES = 288, 8
# Enough to see every channel: 256 pairs are 20,000 token rows a linear.
OBSERVED_PAIRS = 256
# Enough to sort layer groups by what they do; a full-size model has 48.
EFFECT_PAIRS, EFFECT_QUERIES = 32, 8
# How much the last scoring tells of the pace: graphs differ, and so does the machine's load.
PACE_WEIGHT = 0.2


class CalibrationPairs:
    """The queries, their float32 scores, and how much of the search is still ahead.

    Attributes:
        ahead: pairs that are still to be scored at most; whoever plans sets it.
    """

    def __init__(self, graph: Graph, queries: Sequence[Query], progress: Progress):
        """Score all `queries` with the float32 `graph`, once."""
        self._queries, self._progress = queries, progress
        self._seconds_a_pair = 0.0
        self.ahead = 0
        self._sizes = [sum(map(len, query)) for query in queries]
        self.every = list(range(len(queries)))
        self.some = spread_over(self._sizes, COMPARED_PAIRS, COMPARED_QUERIES)
        progress(f"scoring {sum(self._sizes)} calibration pairs in float32")
        self._expected = self.scores(scorer(graph), self.every)

    def num_pairs(self, numbers: Sequence[int]) -> int:
        """Return the pairs of the queries `numbers`."""
        return sum(self._sizes[number] for number in numbers)

    def tell(self, what: str) -> None:
        """Say what runs now and how long all that is ahead may take at most."""
        left = self.ahead * self._seconds_a_pair
        self._progress(f"{what} ({_in_words(left)} left at most)" if left else what)

    def scores(self, score: Score, numbers: Sequence[int]) -> list[Float32]:
        """Return the scores of every query of `numbers`: float32 [C] each."""
        found = [self._timed(score, self._queries[number]) for number in numbers]
        return [np.concatenate(scores) for scores in found]

    def agreement(self, score: Score, numbers: Sequence[int]) -> Agreement:
        """Return how `score` agrees with float32 on the queries `numbers`."""
        expected = [self._expected[number] for number in numbers]
        return rank_agreement(expected, self.scores(score, numbers))

    def few(self) -> list[Batch]:
        """Return the pairs that tell layer groups apart: some of some queries, batch by batch."""
        numbers = spread_over([1] * len(self._queries), EFFECT_QUERIES, 1)
        return shares([self._queries[number] for number in numbers], EFFECT_PAIRS)

    def effects(self, score: Callable[..., Float32], groups: Sequence[str]) -> dict[str, float]:
        """Return the mean |score difference| that quantising each layer group alone makes.

        Args:
            score: called with a batch and the groups that are quantised.
        """
        batches = self.few()

        def scores(quantized: Sequence[str]) -> Float32:
            return np.concatenate(self._timed(lambda batch: score(batch, quantized), batches))

        exact, found = scores(()), {}
        for number, group in enumerate(groups):
            if number % 8 == 0:
                self.tell(f"what layer groups do to the scores: {number + 1} of {len(groups)}")
            found[group] = float(np.abs(scores((group,)) - exact).mean())
        return found

    def _timed(self, score: Score, batches: Sequence[Batch]) -> list[Float32]:
        began, num_pairs = perf_counter(), sum(map(len, batches))
        found = [score(batch) for batch in batches]
        pace = (perf_counter() - began) / num_pairs
        before = self._seconds_a_pair or pace
        self._seconds_a_pair = before + PACE_WEIGHT * (pace - before)
        self.ahead = max(0, self.ahead - num_pairs)
        return found


def spread_over(sizes: Sequence[int], num_pairs: int, num_queries: int) -> list[int]:
    """Return the numbers of queries, evenly spread, that have so many pairs; not fewer queries."""
    mean = sum(sizes) / len(sizes)
    count = min(len(sizes), max(num_queries, round(num_pairs / mean)))
    return [number * len(sizes) // count for number in range(count)]


def shares(queries: Sequence[Query], num_pairs: int) -> list[Batch]:
    """Return about `num_pairs` pairs, the same share of every query."""
    batches = [batch for query in queries for batch in query]
    share = min(1.0, num_pairs / sum(map(len, batches)))
    return [batch.part(slice(0, max(1, round(share * len(batch))))) for batch in batches]


def _in_words(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(1, round(seconds))} s"
