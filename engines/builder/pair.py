"""Which two engines reach a top k fastest: one that scores everything, one that scores survivors.

Pure arithmetic over what `auto` measured. A pair takes, for each candidate, the first engine's
time, and the second's for the share that is scored again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .trial import Trial

# What is wanted, as a share of the candidates: ten of a thousand.
WANTED = 0.01


@dataclass(frozen=True, slots=True)
class Pair:
    """The engine to score with, and the one to put before it where that pays.

    Attributes:
        engine: whose scores and order are the result.
        first: scores everything before it; None where `engine` alone is as fast.
        pairs_per_s: candidates a second that the two work off together.
        alone: the same of the fastest engine that can stand alone.
    """

    engine: Path
    first: Path | None
    pairs_per_s: float
    alone: float

    def to_json(self, trials: Mapping[Path, Trial]) -> dict[str, Any]:
        """Return what a manifest says of the choice."""
        first = None if self.first is None else asdict(trials[self.first])
        return {
            "first": first,
            "pairs_per_s": round(self.pairs_per_s, 1),
            "alone_pairs_per_s": round(self.alone, 1),
            "wanted": f"the best {WANTED:.0%} of the candidates",
        }


def best_pair(trials: Mapping[Path, Trial]) -> Pair | None:
    """Return the fastest way to a top k; None where no engine that can stand alone was timed.

    The second engine of a pair must hold the limits of one that stands alone.
    """
    timed = {folder: trial for folder, trial in trials.items() if trial.pairs_per_s}
    alone = {folder: trial for folder, trial in timed.items() if not trial.is_first}
    if not alone:
        return None
    fastest = max(alone, key=lambda folder: alone[folder].pairs_per_s or 0.0)
    single = alone[fastest].pairs_per_s or 0.0
    best = Pair(fastest, None, single, single)
    for folder, trial in timed.items():
        if not trial.is_first or trial.rescored is None:
            continue
        for engine, precise in alone.items():
            again = min(1.0, trial.rescored + WANTED)
            seconds = 1 / (trial.pairs_per_s or 1.0) + again / (precise.pairs_per_s or 1.0)
            if 1 / seconds > best.pairs_per_s:
                best = Pair(engine, folder, 1 / seconds, single)
    return best
