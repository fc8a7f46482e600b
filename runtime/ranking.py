"""Candidates -> rows to score; scores -> hits, best first, and every other candidate named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import StoreError
from .pipeline import Scored
from .results import EngineLabel, Fault, Hit, RankResult, Rescoring, StageTimes
from .store import TokenStore

Missing = Literal["error", "skip"]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Value = TypeVar("Value", np.float32, np.bool_)

_NO_SCORE, _NO = np.float32(np.nan), np.bool_(False)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The images that one query ranks.

    Attributes:
        ids: as they were asked for.
        rows: int64 [U]: the store's rows of them, each once.
        place: int64 [N]: where in `rows` each candidate stands; -1: the store does not hold it.
    """

    ids: Sequence[str]
    rows: Int64
    place: Int64

    @classmethod
    def find(cls, store: TokenStore, ids: Sequence[str], missing: Missing) -> Candidates:
        """Look `ids` up.

        Raises:
            RequestError: (`error`) ids that the store does not hold.
        """
        found = store.rows(ids, missing="raise" if missing == "error" else "mark")
        rows, place = np.unique(found, return_inverse=True)
        if len(rows) and rows[0] < 0:  # -1 comes first
            return cls(ids, rows[1:], place - 1)
        return cls(ids, rows, place)

    def missing(self) -> tuple[Fault, ...]:
        """Name the candidates that the store does not hold."""
        places = np.flatnonzero(self.place < 0).tolist()
        return tuple(Fault(self.ids[i], "it is not in the store", i) for i in places)

    def result(
        self,
        scored: Scored,
        top_k: int | None,
        truncated: bool,
        times: StageTimes,
        engine: EngineLabel,
        rescoring: Rescoring | None = None,
        *,
        stopped: bool = False,
    ) -> RankResult:
        """Rank what was scored; `stopped`: what was skipped got no score of any engine."""
        errors, missing = faults_of(self.ids, scored, self.place), self.missing()
        num_scored = len(self.ids) - len(errors) - len(missing)
        if stopped and scored.skipped is not None:
            num_scored -= int(np.count_nonzero(_each(scored.skipped, self.place, _NO)))
        return RankResult(
            hits_of(self.ids, _each(scored.scores, self.place, _NO_SCORE), top_k),
            errors,
            truncated,
            times,
            engine,
            rescoring,
            missing,
            len(self.ids),
            num_scored,
        )


def hits_of(ids: Sequence[str], scores: Float32, top_k: int | None) -> tuple[Hit, ...]:
    """Sort by descending score, ties in the order given; leave out what is not finite."""
    order = np.argsort(-scores, kind="stable")
    sound = order[np.isfinite(scores[order])][:top_k]
    places, values = sound.tolist(), scores[sound].tolist()
    return tuple(Hit(ids[i], score, i) for i, score in zip(places, values, strict=True))


def faults_of(ids: Sequence[str], scored: Scored, place: Int64) -> tuple[Fault, ...]:
    """Name every candidate without a finite score; candidate i has the score of `place[i]`."""
    faulty = ~np.isfinite(scored.scores)
    if scored.skipped is not None:
        faulty &= ~scored.skipped
    places = np.flatnonzero(_each(faulty, place, _NO)).tolist()
    return tuple(Fault(ids[i], _reason(scored, int(place[i])), i) for i in places)


def _each(values: npt.NDArray[Value], place: Int64, nothing: Value) -> npt.NDArray[Value]:
    """Return `values[place]`, and `nothing` where the place is -1."""
    return np.append(values, nothing)[place]


def _reason(scored: Scored, place: int) -> str:
    why = scored.damaged.get(place)
    if why is not None:
        return f"its stored record is damaged: {why}"
    return f"its score is {scored.scores[place]}: its tokens, or the precision, overflow"


def raise_faults(faults: Sequence[Fault]) -> None:
    """Raise one StoreError that names the faults; return when there are none."""
    if faults:
        raise StoreError(
            f"{len(faults)} pairs have no score",
            faults=[f"{fault.id!r}: {fault.reason}" for fault in faults[:20]],
            hint="`edje store verify --repair STORE` takes damaged records out; then index again",
        )
