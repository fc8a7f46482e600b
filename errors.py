"""The errors users meet: what failed, what was got, what was expected, and the mend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class EdjeError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        message: one sentence: what failed, what was got, what was expected.
        faults: every fault of one input, shown one a line (all at once, never the first only).
        hint: the command or the change that mends it.

    Attributes:
        stage: the pipeline's stage that failed: `gather`, `copy`, `compute` or `collect`; None
            elsewhere.
    """

    stage: str | None = None

    def __init__(self, message: str, *, faults: Sequence[str] = (), hint: str | None = None):
        self.message = message
        self.faults = tuple(faults)
        self.hint = hint
        lines = [message, *(f"  - {fault}" for fault in self.faults)]
        if hint:
            lines.append(f"Hint: {hint}")
        super().__init__("\n".join(lines))

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.stage is None else f"{text}\nStage: {self.stage}"


class CheckpointError(EdjeError):
    """A checkpoint, its Hugging Face folders or a model bundle cannot be used."""


class EngineError(EdjeError):
    """An engine cannot be built, opened or run."""


class StoreError(EdjeError):
    """A token store cannot be created, opened, read or written."""


class RequestError(EdjeError):
    """A request (query, candidates, options) cannot be served as it stands."""


class StoppedError(RequestError):
    """A request's deadline passed, or its caller cancelled it, before all of it was scored.

    Attributes:
        partial: what the call would have returned, as far as it got. `Reranker.rank`: a
            `RankResult` of the images scored so far, which may lack better ones.
            `Reranker.predict`: float32 [N], NaN where there is no score.
        num_scored: images (`predict`: pairs) with a score so far.
        num_asked: images (pairs) that were asked for.
    """

    def __init__(
        self, message: str, *, partial: Any = None, num_scored: int = 0, num_asked: int = 0
    ):
        super().__init__(message)
        self.partial = partial
        self.num_scored = num_scored
        self.num_asked = num_asked


def counted(number: int, one: str, many: str) -> str:
    """Return a number and what is counted: `1 id is`, `2 ids are`."""
    return f"{number:,} {one if number == 1 else many}"


def named(names: Sequence[str], *, limit: int = 20) -> str:
    """Return `names` quoted and joined, at most `limit` of them, with the count of the rest."""
    shown = ", ".join(repr(name) for name in names[:limit])
    rest = len(names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
