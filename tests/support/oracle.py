"""A precise engine that is a list of scores, asked by `search` round for round."""

from __future__ import annotations

import numpy as np

from edje.arrays import Float32, Int64
from edje.runtime.survivors import PAIRS_PER_ROUND, Rule, Selection, search


class Oracle:
    """Hands out precise scores and remembers what it was asked.

    Attributes:
        rounds: the positions of each round.
    """

    def __init__(self, scores: Float32):
        self.scores = np.asarray(scores, np.float32)
        self.rounds: list[list[int]] = []

    def rescore(
        self, fast: Float32, *, top_k: int, rule: Rule, pairs_per_round: int = PAIRS_PER_ROUND
    ) -> Selection:
        """Score what `search` asks for until it has enough."""
        asks = search(fast, top_k=top_k, rule=rule, pairs_per_round=pairs_per_round)
        try:
            positions = next(asks)
            while True:
                positions = asks.send(self._scores_of(positions))
        except StopIteration as end:
            found: Selection = end.value
            return found

    @property
    def asked(self) -> list[int]:
        """Return all positions that were asked for, in order."""
        return [position for positions in self.rounds for position in positions]

    def _scores_of(self, positions: Int64) -> Float32:
        self.rounds.append(positions.tolist())
        return self.scores[positions]
