"""What a request to the service is while it waits, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import isfinite
from time import perf_counter
from typing import Literal

import numpy as np

from ...arrays import Float32, Int64
from ..cascade import Steps
from ..pipeline import Scored
from ..results import Candidates, EngineLabel, Fault, Hit, Rescoring, faults_of
from ..text import TokenizedQueries
from .scheduler import Job

Unknown = Literal["error", "lowest", "skip"]


@dataclass(slots=True)
class Stages:
    """Milliseconds of one request's stages.

    `queue` is the time until its first batch was formed; `read`, `upload`, `compute` and
    `download` are those of the batches that its pairs were in, shared with other requests.
    """

    tokenize: float = 0.0
    resolve: float = 0.0
    queue: float = 0.0
    read: float = 0.0
    upload: float = 0.0
    compute: float = 0.0
    download: float = 0.0
    total: float = 0.0

    def add_batch(self, scored: Scored) -> None:
        """Add the times of one batch."""
        self.read += scored.gather_ms
        self.upload += scored.upload_ms
        self.compute += scored.compute_ms
        self.download += scored.download_ms


@dataclass(frozen=True, slots=True)
class Answer:
    """The ranking of one request, as arrays.

    Attributes:
        ids: the candidates, in the order given; rows are named by their number.
        order: int64 [K]: positions of the ranked candidates, best first.
        logits: float32 [K]: their raw scores, descending; -inf for ids that the store lacks and
            that rank last (`unknown="lowest"`).
        errors: candidates whose stored record is damaged or gave no finite score.
        missing: candidates that the store lacks, in their order.
        truncated: the query had more wordpieces than the model takes; the rest was cut.
        num_wordpieces: of the query, as the model reads it, [CLS] and [SEP] included.
        stages: where the time went.
        engine: what scored all candidates.
        rescoring: what a cascade's precise engine did; None where one engine did everything.
        num_asked: candidates, duplicates and missing ones included.
        unreached: candidates of shards that are down, where the caller allowed that.
    """

    ids: Sequence[str]
    order: Int64
    logits: Float32
    errors: tuple[Fault, ...]
    missing: tuple[Fault, ...]
    truncated: bool
    num_wordpieces: int
    stages: Stages
    engine: EngineLabel
    rescoring: Rescoring | None
    num_asked: int
    unreached: tuple[Fault, ...] = ()

    @property
    def hits(self) -> tuple[Hit, ...]:
        """The ranking as `Reranker.rank` gives it: id, raw score, position."""
        positions = self.order.tolist()
        return tuple(map(Hit, [self.ids[i] for i in positions], self.logits.tolist(), positions))


@dataclass(slots=True, eq=False)
class Waiting(Job):
    """A request between `submit` and its answer.

    Attributes:
        future: what the caller holds.
        queries: its query, tokenised.
        asked: its candidates; `asked.rows` are the pairs.
        top_n: how many are wanted; None: all.
        unknown: what candidates do that the store lacks.
        began: when it was submitted, as `perf_counter` counts.
        stages: where its time went so far.
        scored: of the pairs that are asked for now, filled batch by batch; in the end of all.
        steps: of a cascade; None: the last engine scores everything.
        pairs: int64 [M]: of a cascade, positions in `asked.rows` of those asked for now.
        rescoring: what a cascade did.
        num_scored: pairs asked for now whose batch is done.
    """

    future: Future[Answer] = field(kw_only=True)
    queries: TokenizedQueries = field(kw_only=True)
    asked: Candidates = field(kw_only=True)
    top_n: int | None = field(kw_only=True)
    unknown: Unknown = field(kw_only=True)
    began: float = field(kw_only=True)
    stages: Stages = field(kw_only=True)
    scored: Scored = field(kw_only=True)
    steps: Steps | None = field(default=None, kw_only=True)
    pairs: Int64 | None = field(default=None, kw_only=True)
    rescoring: Rescoring | None = field(default=None, kw_only=True)
    num_scored: int = field(default=0, kw_only=True)

    def take_in(self, start: int, part: Scored, pairs: slice) -> None:
        """Take in the scores that the batch `part` has in `pairs`, for the pairs from `start`."""
        scores = part.scores[pairs]
        self.scored.scores[start : start + len(scores)] = scores
        for position, why in part.damaged.items():
            if pairs.start <= position < pairs.stop:
                self.scored.damaged[start + position - pairs.start] = why
        self.stages.add_batch(part)
        self.num_scored += len(scores)

    @property
    def rows(self) -> Int64:
        """Rows of the pairs that are asked for now: int64 [M]."""
        return self.asked.rows if self.pairs is None else self.asked.rows[self.pairs]

    def go_on(self) -> bool:
        """Ask for what the cascade wants scored next; False: there is nothing more.

        Called first before anything was asked for, then whenever all of that has its score.
        """
        if self.steps is None:
            return False
        try:
            step = next(self.steps) if self.pairs is None else self.steps.send(self.scored)
        except StopIteration as end:
            self.scored, self.rescoring = end.value
            return False
        self.stage, self.pairs, self.num_pairs = step.stage, step.pairs, len(step.pairs)
        self.num_taken = self.num_scored = 0
        self.scored = Scored(np.empty(self.num_pairs, np.float32), {})
        return True

    def answer(self, engine: EngineLabel) -> Answer:
        """Rank what was scored."""
        asked, scored = self.asked, self.scored
        missing = asked.missing()
        errors: tuple[Fault, ...] = ()
        if missing:
            scores = np.append(scored.scores, np.float32(np.nan))[asked.position]
        else:
            scores = scored.scores[asked.position]
        order = (-scores).argsort(kind="stable")
        # What is not finite stands at an end.
        ends = scores.item(order.item(0)), scores.item(order.item(-1))
        if missing or not all(map(isfinite, ends)):
            errors = faults_of(asked.ids, scored, asked.position)
            if self.unknown == "lowest":
                scores[asked.position < 0] = -np.inf
            order = (-scores).argsort(kind="stable")
            order = order[~np.isnan(scores[order])]
        order = order[: self.top_n]
        self.stages.total = (perf_counter() - self.began) * 1e3
        return Answer(
            ids=asked.ids,
            order=order,
            logits=scores[order],
            errors=errors,
            missing=missing,
            truncated=bool(self.queries.truncated[0]),
            num_wordpieces=int(self.queries.text_length[0]),
            stages=self.stages,
            engine=engine,
            rescoring=self.rescoring,
            num_asked=len(asked.position),
        )
