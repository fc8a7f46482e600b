"""Keep-alive HTTP/1.1 connections to one server: all that a router does a thousand times a second.

Parsed by httptools, as uvicorn does: no redirects, cookies or proxies, for no shard has them.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools

from ....errors import RequestError

CONNECT_TIMEOUT_S = 1.0
MAX_IDLE = 64  # connections kept; what is needed beyond is closed after its answer


class Reply(NamedTuple):
    """What a server answered; the headers' names in lower case."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is.

    Attributes:
        url: as the operator wrote it, without a `/` at its end.
        path: what every path begins with.
    """

    url: str
    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None

    @classmethod
    def of(cls, url: str) -> Address:
        """Read `http://host:port` or `https://host:port`.

        Raises:
            RequestError: it is none.
        """
        try:
            found = urlsplit(url)
            port = found.port or (443 if found.scheme == "https" else 80)
        except ValueError as error:
            raise RequestError(f"the shard {url!r} is no URL: {error}") from None
        if found.scheme not in ("http", "https") or not found.hostname or found.query:
            raise RequestError(f"the shard {url!r} is no URL, expected http://HOST:PORT")
        tls = ssl.create_default_context() if found.scheme == "https" else None
        return cls(url.rstrip("/"), found.hostname, port, found.path.rstrip("/"), tls)


class _Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[Reply] | None = None
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self.num_answered = 0
        self.has_answer_begun = False
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no child of it
        self.is_open = True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._end(ConnectionResetError("it closed the connection before its answer was whole"))

    def data_received(self, data: bytes) -> None:
        self.has_answer_begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ConnectionError(f"it answered no HTTP: {error}"))
            self.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, part: bytes) -> None:
        self._parts.append(part)

    def on_message_complete(self) -> None:
        reply = Reply(self._parser.get_status_code(), self._headers, b"".join(self._parts))
        self._headers, self._parts = {}, []
        self.num_answered += 1
        if not self._parser.should_keep_alive():
            self.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(reply)

    async def ask(self, request: bytes) -> Reply:
        """Send a whole request and wait for the answer; cancelling closes the connection."""
        self.has_answer_begun = False
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._waiter
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        """Close it at once: the server learns that nobody waits."""
        if self.is_open:
            self.is_open = False
            self._transport.abort()

    def _end(self, error: Exception) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)


class Connections:
    """Connections to one server, on one event loop."""

    def __init__(self, address: Address):
        self._address = address
        self._idle: list[_Connection] = []
        host = f"[{address.host}]" if ":" in address.host else address.host
        self._host = f"host: {host}:{address.port}\r\n".encode()

    async def post(self, path: str, headers: bytes, body: bytes) -> Reply:
        """Send one request and return the answer.

        A connection that the server closed while it was idle is replaced once, in silence: no
        answer had begun, and scoring twice does no harm.

        Args:
            headers: further lines, each with its end.

        Raises:
            OSError: no connection, or it broke.
        """
        line = f"POST {self._address.path}{path} HTTP/1.1\r\n".encode()
        length = b"content-length: %d\r\n\r\n" % len(body)
        request = b"".join((line, self._host, headers, length, body))
        while True:
            connection = await self._take()
            is_used = connection.num_answered > 0
            try:
                reply = await connection.ask(request)
            except ConnectionResetError:
                if is_used and not connection.has_answer_begun:
                    continue
                raise
            if connection.is_open and len(self._idle) < MAX_IDLE:
                self._idle.append(connection)
            else:
                connection.close()
            return reply

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()

    async def _take(self) -> _Connection:
        """Return an idle connection, or a new one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        where = self._address
        opening = asyncio.get_running_loop().create_connection(
            _Connection, where.host, where.port, ssl=where.tls
        )
        try:
            _, connection = await asyncio.wait_for(opening, CONNECT_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise ConnectionError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        return connection
