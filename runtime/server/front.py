"""The server's ASGI app: hot routes here, everything else by the FastAPI app."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .answers import Answer
from .bodies import Bodies, ClientLeft, Message, Receive
from .exchange import Exchange
from .host import Host
from .hot import Hot, Reply, Route
from .pages import FILES
from .refusals import Refusal
from .time_limit import TimeLimit, Timers
from .turns import Turns

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGE_BODY = 256 << 10  # bytes: read off the event loop, for it takes milliseconds
WATCH_AFTER_S = 0.05  # a request that is answered sooner is not watched for a client that leaves
SEND_TIMEOUT_S = 60.0
# What needs no key: probes and Prometheus have none, and the page asks for one.
OPEN_PATHS = frozenset(FILES) | {
    *("/livez", "/readyz", "/healthz", "/health", "/ping", "/metrics"),
    *("/v2/health/live", "/v2/health/ready"),
}


class Front:
    """The server's ASGI app: hot routes by a dictionary, the rest by `rest`.

    Attributes:
        hot, turns, timers, bodies: what a connection needs that serves hot routes without ASGI.
    """

    def __init__(self, host: Host, rest: App):
        self._host, self._rest = host, rest
        settings = host.settings
        self._needs_key = bool(settings.keys)
        self.turns, self.timers = Turns(), Timers()
        self.hot = Hot(host, self.timers)
        self.bodies = Bodies(
            settings.max_body_bytes, settings.bodies_bytes, self._wait_s, self.timers
        )
        host.metrics.body_bytes.set_function(lambda: self.bodies.num_bytes)
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="edje-large")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] != "http":
            await self._rest(scope, receive, send)
            return
        path = scope["path"]
        route = self.hot.route(path)
        if route is not None:
            if scope["method"] != "POST":
                route = _post_only
            await self._serve(route, Exchange(path, scope["headers"]), receive, send)
        elif path in OPEN_PATHS or not self._needs_key:
            await self._rest(scope, receive, send)
        else:
            try:
                self.hot.keys.check(dict(scope["headers"]).get(b"authorization"))
            except Refusal as refusal:
                exchange = Exchange(path, scope["headers"])
                reply, _ = self.hot.refuse(exchange, refusal)
                await _send(send, reply, exchange)
                self.hot.tell(exchange, reply.status, refusal)
                return
            await self._rest(scope, receive, send)

    async def _serve(self, route: Route, exchange: Exchange, receive: Receive, send: Send) -> None:
        """Answer one request, refuse it in its dialect, or learn that nobody waits."""
        refusal: Refusal | None = None
        raw = b""
        hot = self.hot
        try:
            exchange.key = hot.keys.check(exchange.headers.get(b"authorization"))
            raw = await self.bodies.read(exchange.headers.get(b"content-length", b""), receive)
            if route is not _post_only:
                hot.check_load(exchange, raw, route)
            future = await self._begin(route, exchange, raw)
            reply = hot.end(exchange, await self._answered(exchange, future, receive))
        except ClientLeft:
            hot.tell(exchange, 499)
            return
        except Exception as error:
            reply, refusal = hot.refuse(exchange, error)
        finally:
            self.bodies.release(len(raw))
        await _send(send, reply, exchange)
        hot.tell(exchange, reply.status, refusal)

    async def _begin(self, route: Route, exchange: Exchange, raw: bytes) -> Future[Answer]:
        """Parse and submit: here, or on another thread where that takes long."""
        if len(raw) < LARGE_BODY:
            return self.hot.begin(route, exchange, raw)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._aside, self.hot.begin, route, exchange, raw)

    async def _answered(
        self, exchange: Exchange, future: Future[Answer], receive: Receive
    ) -> Answer:
        """Wait for the answer; at the deadline, or when the client leaves, give the request up."""
        loop = asyncio.get_running_loop()
        assert exchange.service is not None
        self.turns.begin(exchange.service, loop)
        watch: list[asyncio.Task[None]] = []

        async def wait_for_leaving() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            future.cancel()

        watching = self.timers.call_later(
            WATCH_AFTER_S, lambda: watch.append(loop.create_task(wait_for_leaving())), loop
        )
        late = self.hot.limit(exchange, future, loop)
        try:
            return await self.turns.result(future)
        except asyncio.CancelledError:
            if future.cancelled():
                raise ClientLeft from None
            future.cancel()
            raise
        finally:
            watching.cancel()
            late.cancel()
            for task in watch:
                task.cancel()
            self.hot.leave(exchange)

    def _wait_s(self) -> float:
        service = self._host.service
        return 0.0 if service is None else service.load().wait_s


async def _send(send: Send, reply: Reply, exchange: Exchange) -> None:
    """Send one whole answer; a client that does not read it is left after a minute."""
    payload = reply.payload
    headers = {**reply.headers, "content-length": str(len(payload)), "x-request-id": exchange.id}
    lines = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": lines})
    body = {"type": "http.response.body", "body": payload}
    if len(payload) < 1 << 16:  # below the transport's buffer: never waits
        await send(body)
        return
    with TimeLimit(SEND_TIMEOUT_S):
        await send(body)


def _post_only(exchange: Exchange, raw: bytes) -> Future[Answer]:
    raise Refusal(405, "this route takes POST", reason="method", headers={"allow": "POST"})
