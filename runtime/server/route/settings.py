"""What `edje route` was told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....errors import RequestError
from ..settings import FrontSettings
from .connections import Address
from .counters import Counters
from .router import RoutingService
from .shards import HttpShard, Replica

if TYPE_CHECKING:
    from ..contract import Service
    from ..metrics import Metrics


@dataclass(frozen=True, slots=True)
class RouteSettings(FrontSettings):
    """A router.

    Attributes:
        shards: for each shard the URLs of the servers that hold it.
        partial: answer without shards that are down even where the caller does not ask for it.
        shard_model: the name that the shards' servers give their model.
        shard_key: their bearer key; None: they want none.
    """

    shards: Sequence[Sequence[str]]
    partial: bool = False
    shard_model: str = "edje"
    shard_key: str | None = None

    @property
    def places(self) -> dict[str, Any]:
        """The shards' servers."""
        return {"shards": [list(urls) for urls in self.shards]}

    def check(self) -> None:
        """Refuse what cannot be meant, all of it."""
        faults: list[str] = []
        try:
            super(RouteSettings, self).check()
        except RequestError as wrong:
            faults += wrong.faults or [wrong.message]
        if not self.shards:
            faults.append("there are no shards, expected --shard URL[,URL] for each")
        every = [url.rstrip("/") for urls in self.shards for url in urls]
        faults += [f"the server {url} is named twice" for url in set(every) if every.count(url) > 1]
        for url in every:
            try:
                Address.of(url)
            except RequestError as wrong:
                faults.append(wrong.message)
        if faults:
            raise RequestError("edje route cannot be called so", faults=faults)

    def open_service(
        self, metrics: Metrics, on_failure: Callable[[Exception], None] = lambda _: None
    ) -> Service:
        """Ask the shards what they hold."""
        counters = metrics.own(Counters)
        shards = []
        for number, urls in enumerate(self.shards):
            name = f"shard {number}"
            replicas = [Replica(Address.of(url), self.shard_model, self.shard_key) for url in urls]
            retries = counters.retries.labels(name)
            shards.append(HttpShard(name, replicas, on_retry=retries.inc, on_change=on_failure))
        return RoutingService(shards, self.service, counters, partial=self.partial)
