"""A connection as uvicorn holds it, which does not wait for ever for its client."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 30.0
READER_TIMEOUT_S = 60.0


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

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(cast(asyncio.Transport, Joined(transport, self.loop)))
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Parse what came; what is no whole head yet has to become one in time."""
        super().data_received(data)
        if self._head_is_due and self._head is None and not self.transport.is_closing():
            self._wait_for_head()

    def on_message_begin(self) -> None:
        """See a request's first line begin."""
        super().on_message_begin()
        self._head_is_due = True

    def on_headers_complete(self) -> None:
        """See a request's head end."""
        self._head_is_due = False
        if self._head is not None:
            self._head.cancel()
            self._head = None
        super().on_headers_complete()

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
        self._head = self._reader = None
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._head = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
