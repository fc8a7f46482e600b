"""Shards as Ray Serve deployments: one each, its replicas are the copies; an ingress routes.

Ray places, restarts and balances the replicas; ids -> shard and the merge are the router's, as they
are over HTTP. Ids and scores travel as the bytes of KServe's binary inference.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from ray import cluster_resources, exceptions, serve
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)

from ..app import make_app
from ..host import DRAIN_S, Host
from ..identity import STATE_HEADER, scorer_of
from ..kserve import read_infer, write_infer
from ..logs import JsonLog
from ..refusals import Refusal, refusal_of
from ..settings import FrontSettings, Settings
from .connections import Reply
from .contract import Held, down
from .counters import Counters
from .router import RoutingService
from .wire import Message

if TYPE_CHECKING:
    from ..contract import Service
    from ..metrics import Metrics

APP = "edje"
END_S = 30.0  # that a drained replica may take to go
MAX_ONGOING = 256  # of one replica: its queue is the service's, which refuses by itself
_LOST = (
    exceptions.RayActorError,
    exceptions.TaskCancelledError,
    BackPressureError,
    DeploymentUnavailableError,
)
_encode = msgspec.json.Encoder().encode


class ShardServer:
    """One replica of a shard: engine, store, and the health that `edje serve` has."""

    def __init__(self, settings: Settings):
        """Open engine and store."""
        self._host = Host(settings, JsonLog())

    async def infer(
        self, body: bytes, head_length: int, timeout_s: float
    ) -> tuple[int, dict[str, str], bytes]:
        """Score; return status, headers and body as `edje serve` would."""
        try:
            service = self._host.service
            assert service is not None
            request = read_infer(body, str(head_length))
            answer = await asyncio.wrap_future(
                service.submit(
                    request.query, request.candidates, timeout_s=timeout_s, unknown=request.unknown
                )
            )
            payload, headers = write_infer(request, answer, self._host.settings.model)
            identity = service.identity()
            return 200, {**headers, STATE_HEADER: identity.tag if identity else ""}, payload
        except Exception as error:
            refusal = refusal_of(error)
            return refusal.status, dict(refusal.headers), _encode(refusal.body())

    def look(self, tag: str | None) -> tuple[str, str, bytes | None, dict[str, Any]]:
        """Return tag, scorer, digests (None where `tag` is still right) and facts."""
        service = self._host.service
        identity = None if service is None else service.identity()
        assert service is not None
        assert identity is not None
        digests = None if identity.tag == tag else identity.to_bytes()
        return identity.tag, identity.scorer, digests, service.facts()

    def check_health(self) -> None:
        """Let Ray replace this replica when its engine is dead."""
        if self._host.health.dead:
            raise RuntimeError(self._host.health.fault)


class RayShard:
    """A shard that Ray's handle reaches; Ray chooses the replica."""

    def __init__(self, name: str, handle: Any, on_retry: Callable[[], None]):
        self.name = name
        self.fault: str | None = "it has not been asked yet"
        self._handle, self._on_retry = handle, on_retry
        self._held: Held | None = None
        self._scorer: str | None = None

    def look(self, timeout_s: float) -> None:
        """Ask a replica what it holds."""
        known = None if self._held is None else self._held.tag
        try:
            found = self._handle.look.remote(known).result(timeout_s=timeout_s)
        except (exceptions.RayError, RayServeException, TimeoutError) as error:
            self.fault = str(error) or type(error).__name__
            return
        tag, scorer, raw, facts = found
        if raw is not None:
            self._held = Held(tag, scorer, np.frombuffer(raw, "<u8").astype(np.uint64), facts)
        self.fault = None

    def held(self) -> list[Held]:
        """Return what it holds."""
        return [] if self._held is None else [self._held]

    def use(self, scorer: str | None) -> None:
        """Take no scores of another scorer."""
        self._scorer = scorer

    @property
    def num_ready(self) -> int:
        """1 where a replica answered lately: how many there are Ray knows."""
        return int(self.fault is None)

    async def ask(self, message: Message, deadline: float) -> Reply:
        """Send a request, once more where the replica died on it."""
        lost: Exception | None = None
        for attempt in range(2):
            left_s = deadline - monotonic()
            if left_s <= 0:
                break
            if attempt:
                self._on_retry()
            call = self._handle.infer.remote(message.body, message.head_length, left_s)
            try:
                status, headers, body = await asyncio.wait_for(call, left_s)
            except asyncio.TimeoutError:
                break
            except _LOST as error:
                lost = error
                continue
            return self._checked(status, headers, body)
        if lost is not None:
            raise down(self.name, lost)
        text = f"the deadline passed before {self.name} answered"
        raise Refusal(504, text, reason="deadline")

    def close(self) -> None:
        """Do nothing: Ray holds the connections."""

    def _checked(self, status: int, headers: dict[str, str], body: bytes) -> Reply:
        if status != 200:
            said = str(msgspec.json.decode(body)["message"])
            raise Refusal(status, said, reason="shard", headers=headers)
        state, held = headers.get(STATE_HEADER, ""), self._held
        if held is None or scorer_of(state) != scorer_of(held.tag):
            raise down(self.name, "it has another scorer than before")
        told = {name.encode(): value.encode() for name, value in headers.items()}
        return Reply(status, told, body)


@dataclass(frozen=True, slots=True)
class RaySettings(FrontSettings):
    """The ingress: a router to deployments.

    Attributes:
        deployments: their names, shard by shard.
    """

    deployments: Sequence[str]

    @property
    def places(self) -> dict[str, Any]:
        """The deployments."""
        return {"deployments": list(self.deployments)}

    def open_service(
        self, metrics: Metrics, on_failure: Callable[[Exception], None] = lambda _: None
    ) -> Service:
        """Ask the deployments what they hold."""
        counters = metrics.own(Counters)
        return RoutingService(
            [
                RayShard(
                    f"shard {number}",
                    serve.get_deployment_handle(name, app_name=APP),
                    counters.retries.labels(f"shard {number}").inc,
                )
                for number, name in enumerate(self.deployments)
            ],
            self.service,
            counters,
        )


def application(
    shards: Sequence[Settings],
    front: FrontSettings,
    *,
    copies: int = 1,
    num_cpus: float = 1.0,
    drain_s: float = DRAIN_S,
    **actor_options: Any,
) -> serve.Application:
    """Return what `serve.run` runs: a deployment a shard, and the ingress before them.

    Args:
        shards: engine and store of each.
        front: how the ingress speaks HTTP.
        copies: replicas of each shard.
        num_cpus: that Ray keeps free for each replica, and for the ingress.
        drain_s: how long a replica that Ray ends may work on what it accepted.
        actor_options: more of each replica: `num_gpus`, `resources`.
    """
    names = [f"shard-{number}" for number in range(len(shards))]
    ending = {"graceful_shutdown_timeout_s": drain_s}
    bound = [
        serve.deployment(
            name=name,
            num_replicas=copies,
            max_ongoing_requests=MAX_ONGOING,
            ray_actor_options={"num_cpus": num_cpus, **actor_options},
            **ending,
        )(ShardServer).bind(settings)
        for name, settings in zip(names, shards, strict=True)
    ]
    own = {name: getattr(front, name) for name in FrontSettings.__dataclass_fields__}
    settings = RaySettings(names, **own)

    def build() -> Any:
        return make_app(Host(settings, JsonLog()))

    @serve.ingress(build)
    class Ingress:
        """Routes; it has the handles so that Ray deploys what they stand for."""

        def __init__(self, *handles: Any):
            self.handles = handles

    made = serve.deployment(
        name="ingress",
        max_ongoing_requests=4 * MAX_ONGOING,
        ray_actor_options={"num_cpus": num_cpus},
        **ending,
    )(Ingress)
    return made.bind(*bound)


def run(
    shards: Sequence[Settings],
    front: FrontSettings,
    *,
    copies: int,
    num_cpus: float,
    drain_s: float,
    address: str,
    port: int,
    on_lack: Callable[[float, float], None],
) -> None:
    """Serve on the Ray cluster of `RAY_ADDRESS`, or on a local one, until Ctrl-C or SIGTERM.

    Then the deployments finish what they accepted, within `drain_s` seconds, and go.

    Args:
        on_lack: called with what is asked for and what there is, where the cluster has too few
            CPUs now: Ray lets replicas wait for more of them without a word.
    """
    serve.start(http_options={"host": address, "port": port})
    asked = num_cpus * (len(shards) * copies + 1)
    there = cluster_resources().get("CPU", 0.0)
    if asked > there:
        on_lack(asked, there)
    made = application(shards, front, copies=copies, num_cpus=num_cpus, drain_s=drain_s)
    signal.signal(signal.SIGTERM, _end)  # Ray's own ends the process by an abort
    try:
        serve.run(made, name=APP, blocking=True)
    finally:
        serve.delete(APP, _blocking=False)  # Ray's own wait ends in an error after a minute
        until = monotonic() + drain_s + END_S
        while APP in serve.status().applications and monotonic() < until:
            sleep(0.1)


def _end(sig: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
