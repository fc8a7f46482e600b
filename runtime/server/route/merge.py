"""Scores of several shards -> one ranking, as one engine over all ids would give it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from ....arrays import Int64
from ...results import EngineLabel, Fault
from ..answers import Answer, Stages, Unknown
from ..limits import UnknownIdsError
from .wire import Scores

NOT_HERE = "it is not in the store"


@dataclass(slots=True)
class Parts:
    """The candidates of one request, by shard, and what came back.

    Attributes:
        ids: in the order given.
        sent: for each shard that was asked, int64 [M]: positions of its candidates.
        scores: for each of these, what it scored; None: it was not reached.
        names: of the shards.
        unknown: int64 [M]: positions of ids that no shard holds.
        hidden: int64 [M]: positions of ids that no shard holds which has told its ids.
    """

    ids: Sequence[str]
    sent: list[Int64]
    scores: list[Scores | None]
    names: list[str]
    unknown: Int64
    hidden: Int64


def merge(
    parts: Parts,
    *,
    top_n: int | None,
    unknown: Unknown,
    engine: EngineLabel,
    stages: Stages,
    began: float,
    hidden_by: str,
) -> Answer:
    """Rank by the float32 logit; candidates of equal score keep the order they were given in.

    Args:
        hidden_by: the names of the shards that have not told their ids yet.

    Raises:
        UnknownIdsError: a shard no longer holds an id, and `unknown` is `error`.
    """
    ids = parts.ids
    logits = np.full(len(ids), np.nan, np.float32)
    missing = parts.unknown.tolist()
    errors: list[Fault] = []
    unreached = [Fault(ids[at], f"{hidden_by} is down", at) for at in parts.hidden.tolist()]
    told: Scores | None = None
    for positions, scores, name in zip(parts.sent, parts.scores, parts.names, strict=True):
        if scores is None:
            unreached += [Fault(ids[at], f"{name} is down", at) for at in positions.tolist()]
            continue
        told = scores
        logits[positions] = scores.logits
        missing += positions[list(scores.missing)].tolist()
        for at in positions[list(scores.damaged)].tolist():
            errors.append(Fault(ids[at], "its stored record is damaged", at))
    missing.sort()
    if missing and unknown == "error":
        raise UnknownIdsError([(at, ids[at]) for at in missing])
    if missing and unknown == "lowest":
        logits[missing] = -np.inf
    order = np.argsort(-logits, kind="stable")
    if errors or missing or unreached:
        order = order[~np.isnan(logits[order])]
    order = order[:top_n]
    stages.total = (perf_counter() - began) * 1e3
    return Answer(
        ids=ids,
        order=order,
        logits=logits[order],
        errors=tuple(sorted(errors, key=_index)),
        missing=tuple(Fault(ids[at], NOT_HERE, at) for at in missing),
        truncated=told is not None and told.truncated,
        num_wordpieces=0 if told is None else told.num_wordpieces,
        stages=stages,
        engine=engine,
        rescoring=None,
        num_asked=len(ids),
        unreached=tuple(sorted(unreached, key=_index)),
    )


def _index(fault: Fault) -> int:
    return fault.index
