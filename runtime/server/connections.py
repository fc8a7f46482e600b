"""A connection as uvicorn holds it, which does not wait for ever for its client.

It serves the hot routes itself, without a task or an ASGI message. Everything else goes to the app
as uvicorn does it: large and slow bodies, `Expect`, upgrades, HTTP/1.0, and pipelined requests
behind one that waits.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from functools import partial
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .answers import Answer
from .exchange import Exchange
from .front import LARGE_BODY, Front
from .hot import Reply, Route
from .refusals import Refusal
from .time_limit import Cancellable

HEAD_TIMEOUT_S = 30.0
# Many clients send a body after its head. What takes longer has ASGI's limits, for 30 s more.
BODY_AFTER_HEAD_S = 1.0
READER_TIMEOUT_S = 60.0
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}


class Joined:
    """A transport that sends an answer's head with what follows: one call, one packet, one wake-up.

    uvicorn writes the two apart, each at once. A head that nothing follows (to HEAD) goes at the
    end of the loop's turn. Everything else is the transport's own.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport, self._loop = transport, loop
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        """Send data in order, a head a little later."""
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.writelines((head, data))
        elif data.startswith(b"HTTP/1.1 "):
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def write_whole(self, head: bytes, payload: bytes) -> None:
        """Send a head with all that follows it."""
        self._flush()
        self._transport.writelines((head, payload))

    def close(self) -> None:
        """Close once everything is sent."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._head is not None:
            head, self._head = self._head, None
            self._transport.write(head)


class Cycle:
    """One request that the connection serves itself; what uvicorn asks of its own cycles."""

    __slots__ = ("body_size", "exchange", "future", "keep_alive", "late", "response_complete")

    def __init__(self, exchange: Exchange, *, keep_alive: bool):
        self.exchange = exchange
        self.keep_alive, self.response_complete = keep_alive, False
        self.body_size = 0
        self.future: Future[Answer] | None = None
        self.late: Cancellable | None = None


class Connection(HttpToolsProtocol):
    """Ends when a request's head does not come, or nobody reads the answers.

    uvicorn limits neither: such connections would pile up until no file can be opened. (The body
    has a limit of its own, in the front.)
    """

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        self._head_is_due = True
        self._head: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None
        app = self.config.app
        as_it_is = self.limit_concurrency is None and not self.root_path
        self._front = app if isinstance(app, Front) and as_it_is else None
        self._route: Route | None = None  # of the request whose body comes
        self._parts: list[bytes] = []
        self._size = 0  # of these parts, counted by `Bodies`
        self._rest: Cancellable | None = None  # ends the wait for the rest of them
        self._waiting: Cycle | None = None
        self._idle_since: float | None = None  # after an answer of our own
        self._keeping: asyncio.TimerHandle | None = None
        self._dates: object = None
        self._date_lines = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(cast(asyncio.Transport, Joined(transport, self.loop)))
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Parse what came; what is no whole head yet has to become one in time."""
        self._idle_since = None
        super().data_received(data)
        if self._route is not None and self._rest is None:
            self._wait_for_body()
        if self._head_is_due and self._head is None and not self.transport.is_closing():
            self._wait_for_head()

    def on_message_begin(self) -> None:
        """See a request's first line begin."""
        self._head_is_due = True
        if self._front is None:
            super().on_message_begin()
            return
        self.url, self.headers, self.expect_100_continue = b"", [], False

    def on_headers_complete(self) -> None:
        """See a request's head end."""
        self._head_is_due = False
        if self._head is not None:
            self._head.cancel()
            self._head = None
        if self._front is None:
            super().on_headers_complete()
            return
        self._route = self._hot_route(self._front)
        if self._route is None:
            self._begin_asgi()

    def on_body(self, body: bytes) -> None:
        """Take a part of a body."""
        if self._route is None:
            super().on_body(body)
            return
        assert self._front is not None
        self._parts.append(body)
        if self._size + len(body) < LARGE_BODY and self._front.bodies.hold(len(body)):
            self._size += len(body)
        else:
            self._hand_over()

    def on_message_complete(self) -> None:
        """See a request end, and begin with it if it is hot."""
        route = self._route
        if route is None:
            super().on_message_complete()
            return
        assert self._front is not None
        parts = self._take_parts()
        self._serve(self._front, route, parts[0] if len(parts) == 1 else b"".join(parts))

    def shutdown(self) -> None:
        """End once what was accepted is answered: a head that waits for its body is."""
        if self._route is not None:
            self._hand_over()
        super().shutdown()

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not read what it asked for."""
        super().pause_writing()
        if self._reader is None:
            self._reader = self.loop.call_later(READER_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Learn that the client reads on."""
        super().resume_writing()
        _cancel(self._reader)
        self._reader = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clocks."""
        _cancel(self._head)
        _cancel(self._reader)
        _cancel(self._keeping)
        self._head = self._reader = self._keeping = None
        if self._route is not None and self._front is not None:
            self._front.bodies.release(self._size)
            self._take_parts()
            self._front.hot.tell(Exchange(self.url.decode("latin-1"), self.headers), 499)
        if isinstance(self.cycle, Cycle):
            self.cycle = None  # type: ignore[assignment]
        super().connection_lost(exc)
        if self._waiting is not None and self._waiting.future is not None:
            self._waiting.future.cancel()

    def _hot_route(self, front: Front) -> Route | None:
        """Return what serves this request without ASGI; None: ASGI does."""
        url, parser = self.url, self.parser
        is_plain = (
            parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and (self.cycle is None or self.cycle.response_complete)
            and not self.expect_100_continue
            and not self.flow.write_paused
            and not parser.should_upgrade()
            and not (b"?" in url or b"%" in url or b"#" in url)
        )
        return front.hot.route(url.decode("latin-1")) if is_plain else None

    def _begin_asgi(self) -> None:
        """Do all that uvicorn does at a request's first line, and at the end of its head."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = url, headers, expects
        self.scope["headers"] = headers
        super().on_headers_complete()

    def _wait_for_body(self) -> None:
        """Wait a moment for the rest of a body; ASGI reads those that are large or chunked."""
        assert self._front is not None
        length = next((value for name, value in self.headers if name == b"content-length"), b"")
        if self.transport.is_closing():  # what came behind the head is no HTTP
            self._front.bodies.release(self._size)
            self._take_parts()
        elif length.isdigit() and int(length[:20]) < LARGE_BODY:
            timers = self._front.timers
            self._rest = timers.call_later(BODY_AFTER_HEAD_S, self._hand_over, self.loop)
        else:
            self._hand_over()

    def _take_parts(self) -> list[bytes]:
        """Return what came of a body, and wait for no more of it."""
        parts, self._parts = self._parts, []
        if self._rest is not None:
            self._rest.cancel()
        self._route, self._size, self._rest = None, 0, None
        return parts

    def _hand_over(self) -> None:
        """Let ASGI serve the request, with what has come of its body."""
        assert self._front is not None
        self._front.bodies.release(self._size)
        parts = self._take_parts()
        self._begin_asgi()
        for part in parts:
            super().on_body(part)

    def _serve(self, front: Front, route: Route, raw: bytes) -> None:
        """Begin with a request; `_answer` follows, now or later."""
        hot, loop = front.hot, self.loop
        exchange = Exchange(self.url.decode("latin-1"), self.headers)
        cycle = Cycle(exchange, keep_alive=self.parser.should_keep_alive())
        cycle.body_size = len(raw)
        self.cycle = cast(Any, cycle)
        try:
            exchange.key = hot.keys.check(exchange.headers.get(b"authorization"))
            hot.check_load(exchange, raw, route)
            cycle.future = future = hot.begin(route, exchange, raw)
        except Exception as error:
            front.bodies.release(cycle.body_size)
            self._send(front, cycle, *hot.refuse(exchange, error))
            return
        assert exchange.service is not None
        self._waiting = cycle
        front.turns.begin(exchange.service, loop)
        cycle.late = hot.limit(exchange, future, loop)
        front.turns.when_done(future, partial(self._answer, front, cycle), loop)

    def _answer(self, front: Front, cycle: Cycle) -> None:
        """End a request: it is scored, or failed, or its client left."""
        hot, exchange = front.hot, cycle.exchange
        future, late, self._waiting = cycle.future, cycle.late, None
        assert future is not None
        assert late is not None
        late.cancel()
        cycle.future = None  # which holds this very call, and with it the cycle
        hot.leave(exchange)
        front.bodies.release(cycle.body_size)
        if future.cancelled():
            hot.tell(exchange, 499)
            return
        try:
            reply, refusal = hot.end(exchange, future.result()), None
        except Exception as error:
            reply, refusal = hot.refuse(exchange, error)
        self._send(front, cycle, reply, refusal)

    def _send(self, front: Front, cycle: Cycle, reply: Reply, refusal: Refusal | None) -> None:
        """Send one whole answer; `pause_writing` ends it where nobody reads that."""
        transport = cast(Joined, self.transport)
        cycle.response_complete = True
        if not transport.is_closing():
            transport.write_whole(self._head_of(cycle, reply), reply.payload)
            self.server_state.total_requests += 1
            if not cycle.keep_alive:
                transport.close()
            elif self.pipeline:
                self.on_response_complete()
            else:
                self._idle_since = self.loop.time()
                if self._keeping is None:
                    self._keeping = self.loop.call_later(self.timeout_keep_alive, self._end_idle)
        front.hot.tell(cycle.exchange, reply.status, refusal)

    def _end_idle(self) -> None:
        """Close where the client asked for nothing for so long; else look again, not each time."""
        self._keeping = None
        if self._idle_since is None:
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._keeping = self.loop.call_later(left, self._end_idle)
        else:
            self.timeout_keep_alive_handler()

    def _head_of(self, cycle: Cycle, reply: Reply) -> bytes:
        """Return status line and headers."""
        if self._dates is not self.server_state.default_headers:  # uvicorn's, of this second
            self._dates = dates = self.server_state.default_headers
            self._date_lines = b"".join(b"%s: %s\r\n" % pair for pair in dates)
        if reply.headers.get("connection") == "close":
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            reply.headers["connection"] = "close"
        lines = "\r\n".join([f"{name}: {value}" for name, value in reply.headers.items()])
        if lines.count("\n") != len(reply.headers) - 1:
            raise ValueError(f"a header holds a line's end: {reply.headers}")
        return b"%s%s%s\r\ncontent-length: %d\r\nx-request-id: %s\r\n\r\n" % (
            _STATUS_LINES[reply.status],
            self._date_lines,
            lines.encode("latin-1"),
            len(reply.payload),
            cycle.exchange.id.encode(),
        )

    def _wait_for_head(self) -> None:
        self._head = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
