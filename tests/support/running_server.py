"""A real server on loopback, in a thread of this process, and the least client that asks it."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import uvicorn

from edje.runtime.server import ScoringService
from edje.runtime.server.app import make_app
from edje.runtime.server.connections import Connection
from edje.runtime.server.host import Host
from edje.runtime.server.logs import FLUSH_EVERY_S, JsonLog
from edje.runtime.server.metrics import Metrics
from edje.runtime.server.settings import FrontSettings, Settings, wired
from waiting import wait_until


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenSettings(FrontSettings):
    """A server of whatever service `opens` makes, now and at each reload."""

    opens: Callable[[], ScoringService]

    @property
    def places(self) -> dict[str, Any]:
        return {}

    def open_service(
        self, metrics: Metrics, on_failure: Callable[[Exception], None] = lambda _: None
    ) -> ScoringService:
        return wired(self.opens(), metrics, on_failure)


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Running:
    """A server that takes requests; `certificate` where it speaks TLS."""

    host: Host
    port: int
    log: io.BytesIO
    certificate: Path | None = None

    @property
    def url(self) -> str:
        return f"http{'' if self.certificate is None else 's'}://127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> Reply:
        """Send one request on a connection of its own; a body that is not bytes goes as JSON."""
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            how = method or ("GET" if body is None else "POST")
            connection.request(how, path, raw, dict(headers or {}))
            response = connection.getresponse()
            given = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, given, response.read())
        finally:
            connection.close()

    def lines(self) -> list[dict[str, Any]]:
        """What was logged so far; lines are gathered for a moment before they are written."""
        time.sleep(3 * FLUSH_EVERY_S)
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def metric(self, name: str) -> float:
        """The value of a metric, labels included in its name."""
        text = self.ask("/metrics").body.decode()
        found = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(name)]
        assert found, f"{name} is not among the metrics"
        return sum(map(float, found))


@contextmanager
def running(
    settings: FrontSettings, *, certificate: Path | None = None, **host_options: Any
) -> Iterator[Running]:
    """Serve until the block ends.

    Args:
        certificate: PEM file of it and its private key: serve over TLS.
    """
    stream = io.BytesIO()
    with closing(JsonLog(stream)) as log:
        host = Host(settings, log, **host_options)
        config = uvicorn.Config(
            make_app(host),
            host="127.0.0.1",
            port=0,
            http=Connection,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
            ssl_certfile=certificate,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive(), "the server to start")
            assert thread.is_alive(), "the server did not start"
            port = server.servers[0].sockets[0].getsockname()[1]
            yield Running(host, port, stream, certificate)
        finally:
            server.should_exit = True
            thread.join(20)
            host.close(5.0)


def settings_of(engine: Path, store: Path, **changed: Any) -> Settings:
    """Settings for a small engine: one thread, as tests run beside each other."""
    return Settings(engine, store, opening={"num_threads": 1}, **changed)
