"""What a server was told."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...arguments import Arguments
from ...errors import RequestError
from .limits import ServiceOptions
from .service import ScoringService

if TYPE_CHECKING:
    from .contract import Service
    from .metrics import Metrics

MAX_BODY_BYTES = 16 << 20
BODIES = 16  # of the largest size, that may be there at a time
MODEL = "edje"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSettings(ABC):
    """How one server speaks HTTP, whatever scores for it.

    Attributes:
        service: how requests are queued.
        model: the name that `/v1/models` tells; requests may name any.
        max_body_bytes: larger ones are refused with 413.
        max_bodies_bytes: of all bodies whose requests are not answered yet; what is more is
            refused with 429. None: 16 of the largest.
        keys: bearer keys, one of which a request must carry; empty: none is needed.
        max_pairs_per_key: pairs of one key that may be in flight; None: no limit.
        id_pattern: finds the id in a document that holds more than it (LlamaIndex puts metadata
            before); its first group, or all of it.
        images: folder or folders of the indexed pictures, for the page's thumbnails; None: none.
        log_queries: whether query texts appear in the log.
    """

    service: ServiceOptions = field(default_factory=ServiceOptions)
    model: str = MODEL
    max_body_bytes: int = MAX_BODY_BYTES
    max_bodies_bytes: int | None = None
    keys: Sequence[str] = ()
    max_pairs_per_key: int | None = None
    id_pattern: str | None = None
    images: Path | None = None
    log_queries: bool = False

    @property
    def bodies_bytes(self) -> int:
        """How many bytes of bodies there may be at a time."""
        if self.max_bodies_bytes is None:
            return BODIES * self.max_body_bytes
        return self.max_bodies_bytes

    @property
    @abstractmethod
    def places(self) -> dict[str, Any]:
        """What is served, for the operator alone."""

    @abstractmethod
    def open_service(
        self, metrics: Metrics, on_failure: Callable[[Exception], None] = lambda _: None
    ) -> Service:
        """Open what scores.

        Args:
            metrics: that count what it does.
            on_failure: called with what a batch failed with.

        Raises:
            EdjeError: it cannot be opened.
        """

    def check(self) -> None:
        """Refuse what cannot be meant, all of it.

        Raises:
            RequestError
        """
        given = Arguments("edje serve")
        try:
            self.service.check()
        except RequestError as wrong:
            given.faults += wrong.faults or [wrong.message]
        given.whole("max_body_bytes", self.max_body_bytes, "1 or more bytes")
        if self.bodies_bytes < self.max_body_bytes:
            least = f"{self.max_body_bytes} or more, as one body may have"
            given.refuse("max_bodies_bytes", self.max_bodies_bytes, least)
        if not self.model:
            given.refuse("model", self.model, "a name")
        if any(not key or key != key.strip() for key in self.keys):
            given.faults.append("keys: one is empty or has spaces around it")
        if self.max_pairs_per_key is not None:
            given.whole("max_pairs_per_key", self.max_pairs_per_key, "1 or more, or None")
        if self.id_pattern is not None:
            try:
                re.compile(self.id_pattern)
            except re.error as error:
                given.faults.append(f"id_pattern {self.id_pattern!r} is no expression: {error}")
        if self.images is not None and not self.images.is_dir():
            given.faults.append(f"images: {self.images} is no folder")
        given.check()


@dataclass(frozen=True, slots=True)
class Settings(FrontSettings):
    """A server of one engine and one store.

    Attributes:
        engine, store: folders.
        opening: what else `Reranker.open` takes.
    """

    engine: Path
    store: Path
    opening: Mapping[str, Any] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, Any]:
        """The folders."""
        return {"engine": str(self.engine), "store": str(self.store)}

    def open_service(
        self, metrics: Metrics, on_failure: Callable[[Exception], None] = lambda _: None
    ) -> Service:
        """Open engine and store; one probe learns the score of the known pair."""
        made = ScoringService.open(
            self.engine, store=self.store, options=self.service, **self.opening
        )
        return wired(made, metrics, on_failure)


def wired(
    service: ScoringService, metrics: Metrics, on_failure: Callable[[Exception], None]
) -> ScoringService:
    """Let metrics and host learn what a service does; let it learn the score of a known pair.

    Raises:
        EdjeError: the probe failed; the service is closed.
    """
    service.worker.on_batch = metrics.count_batch
    service.worker.on_failure = on_failure
    try:
        service.probe()
    except BaseException:
        service.close(0.0)
        raise
    return service
