"""The bodies of requests as they come: each may be so large, and all of them together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from math import ceil
from typing import Any

from .refusals import Refusal
from .time_limit import TimeLimit, Timers

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

BODY_TIMEOUT_S = 30.0
_CLOSE = {"connection": "close"}  # what still comes of the body is not read


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class Bodies:
    """Reads bodies and counts what they hold until their requests are answered. One event loop's.

    What is parsed of a body takes several times its bytes, for as long.

    Attributes:
        num_bytes: held now.
    """

    def __init__(
        self,
        max_bytes: int,
        max_together: int,
        wait_s: Callable[[], float],
        timers: Timers | None = None,
    ):
        """`wait_s` tells how long what waits will take: after that some of it is answered."""
        self._max_bytes, self._max_together, self._wait_s = max_bytes, max_together, wait_s
        self._timers = timers
        self.num_bytes = 0

    async def read(self, length: bytes, receive: Receive) -> bytes:
        """Return a whole body, which counts until it is given to `release`.

        Args:
            length: of the header `content-length`; empty where there is none.

        Raises:
            Refusal: 413 too large, 408 it did not come, 429 there are too many others.
            ClientLeft: the client went away.
        """
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            with TimeLimit(BODY_TIMEOUT_S, self._timers) as limited:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    part = message.get("body", b"")
                    size += len(part)
                    self.num_bytes += len(part)
                    if size > self._max_bytes:
                        raise self._too_large()
                    if self.num_bytes > self._max_together:
                        raise self._too_many()
                    if not message.get("more_body"):
                        return b"".join([*parts, part]) if parts else part
                    parts.append(part)
            assert limited.expired
            raise Refusal(408, "the body did not come in time", reason="slow", headers=_CLOSE)
        except BaseException:
            self.num_bytes -= size
            raise

    def hold(self, size: int) -> bool:
        """Count a body that has come as a whole, until `release`; False where it may not be."""
        if size > self._max_bytes or self.num_bytes + size > self._max_together:
            return False
        self.num_bytes += size
        return True

    def release(self, size: int) -> None:
        """Count a body of so many bytes no more: its request is answered."""
        self.num_bytes -= size

    def _too_large(self) -> Refusal:
        message = f"the body is larger than {self._max_bytes:,} bytes"
        return Refusal(413, message, reason="too_large", headers=_CLOSE)

    def _too_many(self) -> Refusal:
        seconds = str(max(1, ceil(self._wait_s())))
        return Refusal(
            429,
            f"the bodies of others fill the memory for them: try again in {seconds} s",
            reason="memory",
            headers={"retry-after": seconds, **_CLOSE},
        )
