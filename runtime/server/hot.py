"""The hot routes in two steps, begin and end, between which the request waits for its scores.

Neither step waits for anything, so that whoever reads requests calls them as he likes: `front` from
tasks that any ASGI server makes, `connections` from uvicorn's parser without a task.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any
from urllib.parse import quote

import msgspec

from ...errors import EngineError, StoppedError
from .answers import Answer, Stages
from .asks import read_body
from .dialects import COHERE, NVIDIA, SCORE, Dialect, rerank_dialect
from .exchange import LONGEST_S, Exchange
from .host import Host
from .identity import STATE_HEADER
from .keys import Keys
from .kserve import HEADER_LENGTH, InferRequest, read_infer, write_infer
from .limits import OverloadedError, check_load
from .refusals import Refusal, refusal_of
from .time_limit import Cancellable, Loop, Timers

PARTIAL_HEADER = b"x-edje-allow-partial"
# Fields of dialects on /rerank that have refusals or a name in the metrics of their own.
REFUSED_OTHERWISE = (b'"texts"', b'"truncation"', b'"property"')
JSON = "application/json"
_encode = msgspec.json.Encoder().encode

Route = Callable[[Exchange, bytes], Future[Answer]]


@dataclass(slots=True)
class Reply:
    """One whole answer; `headers` are latin-1, without length and request id."""

    status: int
    payload: bytes
    headers: dict[str, str]


class Hot:
    """Begins and ends the requests of the hot routes. One event loop's, but for `begin`."""

    def __init__(self, host: Host, timers: Timers):
        self._host, self._timers = host, timers
        settings = host.settings
        self._settings = settings
        self.keys = Keys(settings.keys, settings.max_pairs_per_key)
        pattern = settings.id_pattern
        self._pattern = None if pattern is None else re.compile(pattern)
        self._counted: dict[tuple[str, int], Any] = {}
        rerank, infer = partial(self._rerank, None), self._infer
        self._routes: dict[str, Route] = {
            **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), rerank),
            **dict.fromkeys(("/score", "/v1/score"), partial(self._rerank, SCORE)),
            **dict.fromkeys(("/ranking", "/v1/ranking"), partial(self._rerank, NVIDIA)),
            f"/v2/models/{settings.model}/infer": infer,
            f"/v2/models/{settings.model}/versions/1/infer": infer,
        }

    def route(self, path: str) -> Route | None:
        """Return what `begin` takes for a path; None: it is not hot."""
        found = self._routes.get(path)
        if found is None and path.startswith("/v1/retrieval/") and path.endswith("/reranking"):
            return self._routes["/ranking"]  # NVIDIA's, with the model's name within
        return found

    def check_load(self, exchange: Exchange, raw: bytes, route: Route) -> None:
        """Refuse before the body is decoded where too much waits: refusing has to be cheap.

        Raises:
            OverloadedError: it is refused; `exchange` says in which dialect.
        """
        service = self._host.service
        assert service is not None
        try:
            check_load(service.load(), service.options)
        except OverloadedError:
            if isinstance(route, partial):  # it is not kserve's
                dialect: Dialect | None = route.args[0]
                if dialect is None:
                    told_apart = any(name in raw for name in REFUSED_OTHERWISE)
                    dialect = rerank_dialect(read_body(raw)) if told_apart else COHERE
                exchange.dialect = dialect.name
            raise

    def begin(self, route: Route, exchange: Exchange, raw: bytes) -> Future[Answer]:
        """Parse a body and submit it; the service begins once it is woken. From any thread.

        What the future gives is to be taken by `end`, or `leave` is to be called.

        Raises:
            Refusal, EdjeError: nothing was submitted.
        """
        return route(exchange, raw)

    def limit(self, exchange: Exchange, future: Future[Answer], loop: Loop) -> Cancellable:
        """Let a future fail at the request's deadline; cancel what is returned once it is done."""
        service, limit = exchange.service, exchange.timeout_s
        assert service is not None
        if limit is not None:  # its own: a length that may never come again
            return loop.call_later(limit, _too_late, future)
        limit = min(service.options.timeout_s, LONGEST_S)
        return self._timers.call_later(limit, partial(_too_late, future), loop)

    def end(self, exchange: Exchange, answer: Answer) -> Reply:
        """Write what was scored."""
        exchange.stages = answer.stages
        encoding = perf_counter()
        assert exchange.write is not None
        payload, headers = exchange.write(exchange, answer)
        self._host.metrics.count_stages(answer.stages, perf_counter() - encoding)
        return Reply(200, payload, self._told_of(answer, headers))

    def leave(self, exchange: Exchange) -> None:
        """Give back what a request took when it began: it is answered, or nobody waits."""
        self.keys.give_back(exchange.key, exchange.num_pairs)

    def refuse(self, exchange: Exchange, error: BaseException) -> tuple[Reply, Refusal]:
        """Write an error in the request's dialect."""
        refusal = refusal_of(error)
        payload = _encode(refusal.body(exchange.dialect))
        return Reply(refusal.status, payload, {"content-type": JSON, **refusal.headers}), refusal

    def tell(self, exchange: Exchange, status: int, refusal: Refusal | None = None) -> None:
        """Count a request and let its line be written."""
        seconds = perf_counter() - exchange.began
        metrics, key = self._host.metrics, (exchange.dialect, status)
        counted = self._counted.get(key)
        if counted is None:
            counted = metrics.requests.labels(exchange.dialect, str(status))
            self._counted[key] = counted
        counted.inc()
        metrics.count_seconds(seconds)
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

    def _rerank(self, dialect: Dialect | None, exchange: Exchange, raw: bytes) -> Future[Answer]:
        """Begin in one of the dialects that are JSON; None: the body tells which."""
        body = read_body(raw)
        found = rerank_dialect(body) if dialect is None else dialect
        exchange.dialect = found.name
        ask = found.read(body, self._pattern)
        ask.check()
        model = self._settings.model
        exchange.write = lambda _, answer: (found.write(ask, answer, model), {"content-type": JSON})
        partial = body.get("allow_partial") is True
        return self._submit(exchange, ask.query, ask.ids, top_n=ask.top_n, partial=partial)

    def _infer(self, exchange: Exchange, raw: bytes) -> Future[Answer]:
        """Begin an inference of KServe."""
        length = exchange.headers.get(HEADER_LENGTH.encode())
        request = read_infer(raw, None if length is None else length.decode("latin-1"))
        exchange.write = partial(self._write_infer, request)
        asked = request.query, request.candidates
        return self._submit(exchange, *asked, partial=request.partial, unknown=request.unknown)

    def _write_infer(
        self, request: InferRequest, exchange: Exchange, answer: Answer
    ) -> tuple[bytes, dict[str, str]]:
        payload, headers = write_infer(request, answer, self._settings.model)
        if request.details and exchange.service is not None:
            identity = exchange.service.identity()
            if identity is not None:
                headers[STATE_HEADER] = identity.tag
        return payload, headers

    def _submit(
        self, exchange: Exchange, query: str, candidates: Any, *, partial: bool, **options: Any
    ) -> Future[Answer]:
        exchange.query, number = query, len(candidates)
        self.keys.take(exchange.key, number)
        exchange.num_pairs = number
        try:
            while True:
                service = exchange.service = self._host.service
                assert service is not None
                try:
                    return service.submit(
                        query,
                        candidates,
                        timeout_s=exchange.timeout_s,
                        partial=partial or exchange.headers.get(PARTIAL_HEADER) in (b"1", b"true"),
                        wake=False,
                        **options,
                    )
                except EngineError:
                    if service is self._host.service:
                        raise
                    # A reload came between: the new service takes it.
        except BaseException:
            self.keys.give_back(exchange.key, number)
            raise

    def _told_of(self, answer: Answer, headers: dict[str, str]) -> dict[str, str]:
        """Add what a client may want to know beside the ranking to `headers`, and count it."""
        metrics = self._host.metrics
        headers["server-timing"] = server_timing(answer.stages)
        headers["x-edje-generation"] = str(self._host.generation)
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


def server_timing(stages: Stages) -> str:
    """Return a request's stages as the header `Server-Timing` has them."""
    return (
        f"tokenize;dur={stages.tokenize:.3f}, resolve;dur={stages.resolve:.3f}, "
        f"queue;dur={stages.queue:.3f}, read;dur={stages.read:.3f}, "
        f"upload;dur={stages.upload:.3f}, compute;dur={stages.compute:.3f}, "
        f"download;dur={stages.download:.3f}, total;dur={stages.total:.3f}"
    )


def _too_late(future: Future[Answer]) -> None:
    with suppress(InvalidStateError):  # answered at this very moment
        future.set_exception(StoppedError("the deadline passed before all of it was scored"))
