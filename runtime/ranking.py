"""Scores -> hits, best first, and a named fault for every candidate without one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import StoreError
from .pipeline import Scored
from .results import Fault, Hit


def hits_of(
    ids: Sequence[str], scores: npt.NDArray[np.float32], top_k: int | None
) -> tuple[Hit, ...]:
    """Sort by descending score, ties in the order given; leave out what is not finite."""
    order = np.argsort(-scores, kind="stable")
    sound = order[np.isfinite(scores[order])][:top_k]
    places, values = sound.tolist(), scores[sound].tolist()
    return tuple(Hit(ids[i], score, i) for i, score in zip(places, values, strict=True))


def faults_of(
    ids: Sequence[str], scored: Scored, place: npt.NDArray[np.int64]
) -> tuple[Fault, ...]:
    """Name every candidate without a finite score; candidate i has the score of `place[i]`."""
    faulty = ~np.isfinite(scored.scores)
    if scored.skipped is not None:
        faulty &= ~scored.skipped
    places = np.flatnonzero(faulty[place]).tolist()
    return tuple(Fault(ids[i], _reason(scored, int(place[i])), i) for i in places)


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
