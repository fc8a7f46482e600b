"""What a server's front needs of whatever scores for it: an engine here, or shards elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from math import inf
from typing import Any, Protocol

from ...arrays import Int64
from ..store import TokenStore
from .answers import Answer, Unknown
from .identity import Identity
from .limits import Load, ServiceOptions


class Service(Protocol):
    """Scores the requests of many callers. Safe from any thread.

    Attributes:
        options: what holds for requests that say nothing else.
    """

    options: ServiceOptions

    @property
    def store(self) -> TokenStore | None:
        """What it reads; None where it has no store itself."""

    @property
    def num_dropped(self) -> int:
        """Pairs that were accepted and never scored."""

    def submit(
        self,
        query: str,
        candidates: Iterable[str] | Int64,
        *,
        top_n: int | None = None,
        timeout_s: float | None = None,
        unknown: Unknown | None = None,
        partial: bool = False,
        wake: bool = True,
    ) -> Future[Answer]:
        """Let a query's candidates wait for their scores; return at once.

        Args:
            candidates: ids; or int64 [N], rows of the store.
            partial: an answer without the candidates of a shard that is down will do.
            wake: begin now; False: once `wake` is called, for who submits several at a time.
        """

    def wake(self) -> None:
        """Begin with what was submitted with `wake=False`."""

    def load(self) -> Load:
        """Return what there is to do."""

    def probe(self, timeout_s: float = 10.0) -> None:
        """Make sure that a request would be served, and right.

        Raises:
            PassingError: it would not, and waiting helps.
            EdjeError: it would not, and only a new process can help.
        """

    def facts(self) -> dict[str, Any]:
        """Return what `/info` says of it; nothing of paths."""

    def identity(self) -> Identity | None:
        """Return which scores it gives, and for which ids; None where it has no store itself."""

    def close(self, drain_s: float = inf) -> None:
        """Refuse new requests, finish those accepted, free everything."""
