"""What a request is refused with: one body that every client's error path can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from math import ceil
from typing import Any

from ...errors import EdjeError, EngineError, RequestError, StoppedError, StoreError
from .limits import OverloadedError, UnknownIdsError

MAX_NAMED = 20  # faults told of one request
ERROR_IS_TEXT = frozenset({"tei", "kserve", "voyage"})  # dialects
DETAIL_IS_TEXT = frozenset({"voyage"})
# Our status -> TEI's name of the kind, which its clients compare.
_KINDS = {
    413: "validation",
    422: "validation",
    400: "validation",
    429: "overloaded",
    503: "unhealthy",
    500: "backend",
    504: "overloaded",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a request.

    Attributes:
        where: names of the fields that lead to it, as FastAPI's `loc` has them.
        message: what was got, what was expected.
        kind: a word for programs.
    """

    where: tuple[str | int, ...]
    message: str
    kind: str = "value_error"


@dataclass(slots=True, eq=False)
class Refusal(Exception):
    """A request that gets no ranking.

    Attributes:
        status: of HTTP.
        message: one sentence that names nothing of this machine.
        faults: all that is wrong.
        reason: a word, for the counter of refusals.
        headers: further ones to answer with.
        cause: what happened inside, for the log alone.
    """

    status: int
    message: str
    faults: Sequence[Fault] = ()
    reason: str = "invalid"
    headers: Mapping[str, str] = field(default_factory=dict)
    cause: BaseException | None = None

    def body(self, dialect: str = "none") -> dict[str, Any]:
        """Return the answer's body, as the clients of a dialect read it.

        Cohere's read `message`, FastAPI's, Infinity's, Jina's and Voyage's `detail`, vLLM's and
        OpenAI's `error`, TEI's and KServe's `error` as a sentence, NVIDIA's `title`. As FastAPI's,
        `detail` is a list of faults at 422 alone; Voyage's clients join it to text even then, and
        older ones fall over an `error` that is an object. At 401 no body has told the dialect yet,
        and a sentence is what all of them can read.
        """
        error: Any = self.message
        if dialect not in ERROR_IS_TEXT and self.status != 401:
            param = None
            if self.faults:
                param = ".".join(map(str, self.faults[0].where))
            code = self.status
            error = {"message": self.message, "type": self.reason, "param": param, "code": code}
        detail: Any = self.message
        if self.status == 422 and dialect not in DETAIL_IS_TEXT:
            faults = self.faults or (Fault((), self.message, self.reason),)
            detail = [
                {"loc": ["body", *fault.where], "msg": fault.message, "type": fault.kind}
                for fault in faults[:MAX_NAMED]
            ]
        return {
            "message": self.message,
            "title": HTTPStatus(self.status).phrase,
            "detail": detail,
            "error": error,
            "error_type": _KINDS.get(self.status, self.reason),
        }


def refusal_of(error: BaseException) -> Refusal:
    """Return how a request is answered that ended with `error`; paths stay inside."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, OverloadedError):
        seconds = max(1, ceil(error.retry_after_s))
        return Refusal(
            429,
            f"too much waits: try again in {seconds} s",
            reason="overloaded",
            headers={"retry-after": str(seconds)},
        )
    if isinstance(error, UnknownIdsError):
        faults = [
            Fault(("documents", at), f"{name[:200]!r} is not in the store", "unknown_id")
            for at, name in error.missing[:MAX_NAMED]
        ]
        return Refusal(422, f"{error.message}: {_named(error)}", faults, "unknown_ids")
    if isinstance(error, StoppedError):
        return Refusal(504, error.message, reason="deadline", cause=error)
    if isinstance(error, RequestError):
        faults = [Fault(("query",), fault) for fault in error.faults]
        return Refusal(422, error.message, faults)
    if isinstance(error, EngineError) and error.stage is None and "closing" in error.message:
        return Refusal(503, error.message, reason="draining", headers={"retry-after": "1"})
    if isinstance(error, StoreError):
        return Refusal(500, "the store could not be read", reason="store", cause=error)
    if isinstance(error, EdjeError):
        return Refusal(500, "the engine failed", reason="engine", cause=error)
    return Refusal(500, "this server failed", reason="bug", cause=error)


def _named(error: UnknownIdsError) -> str:
    names = ", ".join(f"{name[:80]!r}" for _, name in error.missing[:5])
    rest = len(error.missing) - 5
    return f"{names} and {rest} more" if rest > 0 else names
