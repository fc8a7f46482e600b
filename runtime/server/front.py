"""The hot routes as bare ASGI: raw body in, bytes out; everything else goes to the FastAPI app."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Any
from urllib.parse import quote

import msgspec

from ...errors import EngineError, StoppedError
from .answers import Answer
from .asks import read_body
from .bodies import Bodies, ClientLeft, Message, Receive
from .dialects import COHERE, NVIDIA, SCORE, Dialect, rerank_dialect
from .exchange import LONGEST_S, Exchange
from .host import Host
from .identity import STATE_HEADER
from .keys import Keys
from .kserve import HEADER_LENGTH, InferRequest, read_infer, write_infer
from .limits import OverloadedError, check_load
from .pages import FILES
from .refusals import Refusal, refusal_of
from .time_limit import Cancellable, TimeLimit, Timers
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
PARTIAL_HEADER = b"x-edje-allow-partial"
# Fields of dialects on /rerank that have refusals or a name in the metrics of their own.
REFUSED_OTHERWISE = (b'"texts"', b'"truncation"', b'"property"')
_encode = msgspec.json.Encoder().encode


class Front:
    """The server's ASGI app: hot routes by a dictionary, the rest by `rest`."""

    def __init__(self, host: Host, rest: App):
        self._host, self._rest = host, rest
        settings = host.settings
        self._settings = settings
        self._keys = Keys(settings.keys, settings.max_pairs_per_key)
        self._turns, self._timers = Turns(), Timers()
        self._bodies = Bodies(
            settings.max_body_bytes, settings.bodies_bytes, self._wait_s, self._timers
        )
        host.metrics.body_bytes.set_function(lambda: self._bodies.num_bytes)
        pattern = settings.id_pattern
        self._pattern = None if pattern is None else re.compile(pattern)
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="edje-large")
        self._counted: dict[tuple[str, int], Any] = {}
        rerank = partial(self._rerank, None)
        self._hot: dict[str, Callable[..., Awaitable[tuple[bytes, dict[str, str]]]]] = {
            **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), rerank),
            **dict.fromkeys(("/score", "/v1/score"), partial(self._rerank, SCORE)),
            **dict.fromkeys(("/ranking", "/v1/ranking"), partial(self._rerank, NVIDIA)),
            f"/v2/models/{settings.model}/infer": self._infer,
            f"/v2/models/{settings.model}/versions/1/infer": self._infer,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] != "http":
            await self._rest(scope, receive, send)
            return
        path = scope["path"]
        handler = self._hot.get(path)
        if handler is None and path.startswith("/v1/retrieval/") and path.endswith("/reranking"):
            handler = self._hot["/ranking"]  # NVIDIA's, with the model's name within
        if handler is not None:
            if scope["method"] != "POST":
                handler = _post_only
            await self._serve(handler, Exchange(scope), receive, send)
        elif path in OPEN_PATHS or not self._settings.keys:
            await self._rest(scope, receive, send)
        else:
            try:
                self._keys.check(dict(scope["headers"]).get(b"authorization"))
            except Refusal as refusal:
                exchange = Exchange(scope)
                payload = _encode(refusal.body(exchange.dialect))
                headers = {**refusal.headers, "content-type": "application/json"}
                await _send(send, refusal.status, payload, headers, exchange)
                self._told(exchange, refusal.status, refusal)
                return
            await self._rest(scope, receive, send)

    async def _serve(
        self,
        handler: Callable[..., Awaitable[tuple[bytes, dict[str, str]]]],
        exchange: Exchange,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answer one request, refuse it in its dialect, or learn that nobody waits."""
        refusal: Refusal | None = None
        raw = b""
        try:
            exchange.key = self._keys.check(exchange.headers.get(b"authorization"))
            raw = await self._bodies.read(exchange.headers.get(b"content-length", b""), receive)
            payload, headers = await handler(exchange, raw, receive)
            status = 200
        except ClientLeft:
            self._told(exchange, 499, None)
            return
        except Exception as error:
            refusal = refusal_of(error)
            status, headers = refusal.status, dict(refusal.headers)
            payload = _encode(refusal.body(exchange.dialect))
        finally:
            self._bodies.release(raw)
        headers.setdefault("content-type", "application/json")
        await _send(send, status, payload, headers, exchange)
        self._told(exchange, status, refusal)

    async def _rerank(
        self, dialect: Dialect | None, exchange: Exchange, raw: bytes, receive: Receive
    ) -> tuple[bytes, dict[str, str]]:
        """Serve the dialects that are JSON."""

        def begin() -> tuple[Any, Any, Future[Answer]]:
            body = read_body(raw)
            found = rerank_dialect(body) if dialect is None else dialect
            exchange.dialect = found.name
            ask = found.read(body, self._pattern)
            ask.check()
            partial = body.get("allow_partial") is True
            future = self._submit(exchange, ask.query, ask.ids, top_n=ask.top_n, partial=partial)
            return found, ask, future

        self._check_load(exchange, raw, dialect)
        found, ask, future = await self._begin(exchange, begin, raw)
        answer = await self._answered(exchange, future, receive)
        encoding = perf_counter()
        payload = found.write(ask, answer, self._settings.model)
        self._host.metrics.count_stages(answer.stages, perf_counter() - encoding)
        return payload, self._headers(answer)

    async def _infer(
        self, exchange: Exchange, raw: bytes, receive: Receive
    ) -> tuple[bytes, dict[str, str]]:
        """Serve KServe's inference."""
        length = exchange.headers.get(HEADER_LENGTH.encode())

        def begin() -> tuple[InferRequest, Future[Answer]]:
            request = read_infer(raw, None if length is None else length.decode("latin-1"))
            asked = request.query, request.candidates
            future = self._submit(
                exchange, *asked, partial=request.partial, unknown=request.unknown
            )
            return request, future

        self._check_load(exchange, raw)
        request, future = await self._begin(exchange, begin, raw)
        answer = await self._answered(exchange, future, receive)
        encoding = perf_counter()
        payload, headers = write_infer(request, answer, self._settings.model)
        self._host.metrics.count_stages(answer.stages, perf_counter() - encoding)
        headers |= self._headers(answer)
        if request.details and exchange.service is not None:
            identity = exchange.service.identity()
            if identity is not None:
                headers[STATE_HEADER] = identity.tag
        return payload, headers

    def _check_load(self, exchange: Exchange, raw: bytes, dialect: Dialect | None = None) -> None:
        """Refuse before the body is decoded where too much waits: refusing has to be cheap.

        Raises:
            OverloadedError: it is refused; `exchange` says in which dialect.
        """
        service = self._host.service
        assert service is not None
        try:
            check_load(service.load(), service.options)
        except OverloadedError:
            if dialect is None and exchange.dialect == "none":  # it is not kserve's either
                told_apart = any(name in raw for name in REFUSED_OTHERWISE)
                dialect = rerank_dialect(read_body(raw)) if told_apart else COHERE
            if dialect is not None:
                exchange.dialect = dialect.name
            raise

    async def _begin(self, exchange: Exchange, begin: Callable[[], Any], raw: bytes) -> Any:
        """Parse and submit: here, or on another thread where that takes long."""
        if len(raw) < LARGE_BODY:
            return begin()
        return await asyncio.get_running_loop().run_in_executor(self._aside, begin)

    def _submit(
        self, exchange: Exchange, query: str, candidates: Any, *, partial: bool, **options: Any
    ) -> Future[Answer]:
        exchange.query, number = query, len(candidates)
        self._keys.take(exchange.key, number)
        exchange.num_pairs = number
        try:
            while True:
                service = exchange.service = self._host.service
                assert service is not None
                try:
                    return service.submit(
                        query,
                        candidates,
                        timeout_s=exchange.timeout_s(),
                        partial=partial or exchange.headers.get(PARTIAL_HEADER) in (b"1", b"true"),
                        wake=False,
                        **options,
                    )
                except EngineError:
                    if service is self._host.service:
                        raise
                    # A reload came between: the new service takes it.
        except BaseException:
            self._keys.give_back(exchange.key, number)
            raise

    async def _answered(
        self, exchange: Exchange, future: Future[Answer], receive: Receive
    ) -> Answer:
        """Wait for the answer; at the deadline, or when the client leaves, give the request up."""
        loop = asyncio.get_running_loop()
        service = exchange.service
        assert service is not None
        self._turns.begin(service)
        limit = exchange.timeout_s()
        watch: list[asyncio.Task[None]] = []

        async def wait_for_leaving() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            future.cancel()

        watching = self._timers.call_later(
            WATCH_AFTER_S, lambda: watch.append(loop.create_task(wait_for_leaving()))
        )
        late: Cancellable
        if limit is None:
            limit = min(service.options.timeout_s, LONGEST_S)
            late = self._timers.call_later(limit, partial(_too_late, future))
        else:  # its own: a length that may never come again
            late = loop.call_later(limit, _too_late, future)
        try:
            answer = await self._turns.result(future)
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
            self._keys.give_back(exchange.key, exchange.num_pairs)
        exchange.stages = answer.stages
        return answer

    def _wait_s(self) -> float:
        service = self._host.service
        return 0.0 if service is None else service.load().wait_s

    def _headers(self, answer: Answer) -> dict[str, str]:
        """Return what a client may want to know beside the ranking, and count it."""
        stages, metrics = answer.stages, self._host.metrics
        headers = {
            "server-timing": (
                f"tokenize;dur={stages.tokenize:.3f}, resolve;dur={stages.resolve:.3f}, "
                f"queue;dur={stages.queue:.3f}, read;dur={stages.read:.3f}, "
                f"upload;dur={stages.upload:.3f}, compute;dur={stages.compute:.3f}, "
                f"download;dur={stages.download:.3f}, total;dur={stages.total:.3f}"
            ),
            "x-edje-generation": str(self._host.generation),
        }
        if answer.missing:
            metrics.unknown_ids.inc(len(answer.missing))
            names = ",".join(quote(fault.id[:80], safe="") for fault in answer.missing[:20])
            headers["x-edje-missing"] = f"{len(answer.missing)};{names}"
        if answer.unreached:
            reasons = sorted({fault.reason for fault in answer.unreached})
            headers["x-edje-partial"] = f"{len(answer.unreached)};{', '.join(reasons)}"
        if answer.errors:
            metrics.bad_records.inc(len(answer.errors))
        return headers

    def _told(self, exchange: Exchange, status: int, refusal: Refusal | None) -> None:
        """Count the request and let its line be written."""
        seconds = perf_counter() - exchange.began
        metrics, key = self._host.metrics, (exchange.dialect, status)
        counted = self._counted.get(key)
        if counted is None:
            counted = metrics.requests.labels(exchange.dialect, str(status))
            self._counted[key] = counted
        counted.inc()
        metrics.request_seconds.observe(seconds)
        if status == 499:
            metrics.disconnects.inc()
        if refusal is not None:
            metrics.refusals.labels(refusal.reason).inc()
        trace = exchange.headers.get(b"traceparent")
        cause = None if refusal is None or refusal.cause is None else str(refusal.cause)
        self._host.log.write(
            "request",
            id=exchange.id,
            path=exchange.path,
            dialect=exchange.dialect,
            status=status,
            ms=round(seconds * 1e3, 3),
            queue_ms=None if exchange.stages is None else round(exchange.stages.queue, 3),
            pairs=exchange.num_pairs,
            key=exchange.key,
            traceparent=None if trace is None else trace[:80].decode("latin-1"),
            query=exchange.query if self._settings.log_queries else None,
            reason=None if refusal is None else refusal.reason,
            cause=cause,
        )


async def _send(
    send: Send, status: int, payload: bytes, headers: dict[str, str], exchange: Exchange
) -> None:
    """Send one whole answer; a client that does not read it is left after a minute."""
    headers["content-length"] = str(len(payload))
    headers["x-request-id"] = exchange.id
    lines = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    body = {"type": "http.response.body", "body": payload}
    if len(payload) < 1 << 16:  # below the transport's buffer: never waits
        await send(body)
        return
    with TimeLimit(SEND_TIMEOUT_S):
        await send(body)


def _too_late(future: Future[Answer]) -> None:
    with suppress(InvalidStateError):  # answered at this very moment
        future.set_exception(StoppedError("the deadline passed before all of it was scored"))


async def _post_only(exchange: Exchange, *_: object) -> tuple[bytes, dict[str, str]]:
    raise Refusal(405, "this route takes POST", reason="method", headers={"allow": "POST"})
