"""What the router needs of a shard, however it is reached: over HTTP, or by Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ....arrays import UInt64
from ..refusals import Refusal
from .connections import Reply
from .wire import Message


@dataclass(frozen=True, slots=True)
class Held:
    """What a server says of itself.

    Attributes:
        tag: of `Identity`.
        scorer: fingerprint of its model.
        digests: uint64 [N], ascending: of its ids.
        facts: of `/info`.
    """

    tag: str
    scorer: str
    digests: UInt64
    facts: Mapping[str, Any] = field(default_factory=dict)


class Shard(Protocol):
    """One part of the ids, on one server or on several equal ones.

    Attributes:
        name: in messages, logs and metrics; nothing of where it is.
    """

    name: str

    def look(self, timeout_s: float) -> None:
        """Ask every server how it is and, where that changed, what it holds; never raises.

        Blocks: not for an event loop.
        """

    def held(self) -> list[Held]:
        """Return what each server holds that has ever told it."""

    def use(self, scorer: str | None) -> None:
        """Ask no server of another scorer; None: of any."""

    @property
    def num_ready(self) -> int:
        """Servers that take requests, and right."""

    @property
    def fault(self) -> str | None:
        """Why no server of it is ready; None: one is."""

    async def ask(self, message: Message, deadline: float) -> Reply:
        """Send a request, once more to another server where one fails; status is 200.

        Args:
            deadline: as `time.monotonic` counts; told to the server.

        Raises:
            Refusal: no answer; `is_down` tells whether leaving the shard out is a way.
        """

    def close(self) -> None:
        """Give up all connections."""


def down(name: str, cause: object) -> Refusal:
    """Return the refusal for a shard that cannot be reached."""
    return Refusal(
        503,
        f"{name} is not there",
        reason="shard_down",
        headers={"retry-after": "1"},
        cause=ConnectionError(str(cause)),
    )


def is_down(error: BaseException) -> bool:
    """Whether a shard gave nothing, so that a partial answer would go without it."""
    return isinstance(error, Refusal) and error.status in (502, 503, 504)
