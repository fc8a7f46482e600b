"""A shard over HTTP: equal `edje serve` servers, of which one answers each request."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Callable, Sequence
from contextlib import closing
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import numpy as np

from ..identity import SCORER_HEADER, STATE_HEADER, scorer_of
from ..kserve import HEADER_LENGTH
from ..refusals import Refusal
from ..time_limit import TimeLimit
from .connections import Address, Connections, Reply
from .contract import Held, down
from .wire import Message

# What another server may do better: this one fails, ends, or has too much to do.
_RETRIED = frozenset({429, 500, 502, 503})
_MIN_RETRY_S = 0.005  # with less time left, no other server answers either


class Replica:
    """One server.

    Attributes:
        held: what it said that it holds, at last; None: it never did.
        fault: why it is not asked while another can be; None: it is ready.
    """

    def __init__(self, address: Address, model: str, key: str | None):
        """`model`: the server's KServe name; `key`: its bearer key."""
        self.address = address
        self.held: Held | None = None
        self.fault: str | None = "it has not been asked yet"
        self.num_running = 0
        self._path = f"/v2/models/{model}/infer"
        self._headers = {} if key is None else {"authorization": f"Bearer {key}"}
        lines = {**self._headers, "content-type": "application/octet-stream"}
        self._lines = "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode()
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, Connections] = WeakKeyDictionary()

    def look(self, timeout_s: float) -> None:
        """Ask whether it is ready and, where that changed, what it holds."""
        try:
            status, _, body = self._get("/readyz", timeout_s)
            if status != 200:
                why = _decoded(body).get("why", f"status {status}")
                self.fault = f"it is not ready: {why}"
                return
            self._learn(timeout_s)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.fault = str(error) or type(error).__name__
        else:
            self.fault = None

    async def ask(self, message: Message, left_s: float) -> Reply:
        """Send a request that has `left_s` seconds.

        Raises:
            OSError: no connection, or it broke.
        """
        connections = self._loops.get(loop := asyncio.get_running_loop())
        if connections is None:
            connections = self._loops[loop] = Connections(self.address)
        lines = b"%s%s: %d\r\nx-request-timeout-ms: %d\r\n" % (
            self._lines,
            HEADER_LENGTH.encode(),
            message.head_length,
            max(1, int(left_s * 1e3)),
        )
        self.num_running += 1
        try:
            return await connections.post(self._path, lines, message.body)
        finally:
            self.num_running -= 1

    def close(self) -> None:
        """Close its idle connections."""
        for loop, connections in list(self._loops.items()):
            if not loop.is_closed():
                loop.call_soon_threadsafe(connections.close)

    def _learn(self, timeout_s: float) -> None:
        """Learn which ids it holds."""
        known = {} if self.held is None else {"if-none-match": f'"{self.held.tag}"'}
        status, headers, body = self._get("/ids/digests", timeout_s, known)
        if status == 304:
            return
        if status != 200 or SCORER_HEADER not in headers:
            raise ValueError(f"/ids/digests answered {status}: is it `edje serve`, and the key ok?")
        facts = _decoded(self._get("/info", timeout_s)[2])
        tag = headers["etag"].strip('"')
        digests = np.frombuffer(body, "<u8").astype(np.uint64)
        self.held = Held(tag, headers[SCORER_HEADER], digests, facts)

    def _get(
        self, path: str, timeout_s: float, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        where = self.address
        kind: Any = http.client.HTTPConnection
        options: dict[str, Any] = {}
        if where.tls is not None:
            kind, options = http.client.HTTPSConnection, {"context": where.tls}
        with closing(kind(where.host, where.port, timeout=timeout_s, **options)) as connection:
            connection.request(
                "GET", where.path + path, headers={**self._headers, **(headers or {})}
            )
            response = connection.getresponse()
            told = {name.lower(): value for name, value in response.getheaders()}
            return response.status, told, response.read()


class HttpShard:
    """Servers that hold the same ids; the one with the least to do is asked."""

    def __init__(
        self,
        name: str,
        replicas: Sequence[Replica],
        *,
        on_retry: Callable[[], None] = lambda: None,
        on_change: Callable[[Exception], None] = lambda _: None,
    ):
        """Make it of at least one server.

        Args:
            on_retry: called when a request is sent to a second server.
            on_change: called when an answer shows that what is known of a server is out of date.
        """
        self.name = name
        self.replicas = replicas
        self._scorer: str | None = None
        self._turn = 0
        self._on_retry, self._on_change = on_retry, on_change

    def look(self, timeout_s: float) -> None:
        """Ask every server how it is."""
        for replica in self.replicas:
            replica.look(timeout_s)

    def held(self) -> list[Held]:
        """Return what each server holds that has ever told it."""
        return [replica.held for replica in self.replicas if replica.held is not None]

    def use(self, scorer: str | None) -> None:
        """Ask no server of another scorer."""
        self._scorer = scorer

    @property
    def num_ready(self) -> int:
        """Servers that take requests, and right."""
        return sum(each.fault is None and self._fits(each) for each in self.replicas)

    @property
    def fault(self) -> str | None:
        """Why no server of it is ready."""
        if self.num_ready:
            return None
        if any(each.fault is None for each in self.replicas):
            return "it has another scorer than the other shards"
        return "; ".join(dict.fromkeys(each.fault for each in self.replicas if each.fault))

    async def ask(self, message: Message, deadline: float) -> Reply:
        """Send a request to the best server, and to another one where that fails."""
        failure: Refusal | None = None
        tried: list[Replica] = []
        for attempt in range(2):
            replica = self._choose(tried)
            left_s = deadline - monotonic()
            if replica is None or (attempt and left_s < _MIN_RETRY_S):
                break
            if attempt:
                self._on_retry()
            tried.append(replica)
            found = await self._try(replica, message, left_s)
            if isinstance(found, Reply):
                return found
            if found.status not in _RETRIED:
                raise found
            failure = found
        raise failure or down(self.name, self.fault)

    async def _try(self, replica: Replica, message: Message, left_s: float) -> Reply | Refusal:
        """Return what one server answers: scores, or why not."""
        reply: Reply | None = None
        try:
            with TimeLimit(left_s):
                reply = await replica.ask(message, left_s)
        except OSError as error:
            self._lost(replica, error)
            return down(self.name, error)
        if reply is None:
            return Refusal(
                504, f"the deadline passed before {self.name} answered", reason="deadline"
            )
        if reply.status != 200:
            if reply.status in (500, 502, 503):
                self._lost(replica, ConnectionError(f"status {reply.status}"))
            return _refused(self.name, reply)
        return self._checked(replica, reply)

    def _checked(self, replica: Replica, reply: Reply) -> Reply | Refusal:
        """Return the answer, if what scored it is what the server was known for."""
        state = reply.headers.get(STATE_HEADER.encode(), b"").decode("latin-1")
        held = replica.held
        fits = self._fits(replica)  # what is held may have been learned anew since it was asked
        if fits and held is not None and state == held.tag:
            return reply
        changed = ConnectionError("it holds other ids or another scorer than before")
        self._on_change(changed)
        if fits and held is not None and scorer_of(state) == scorer_of(held.tag):
            return reply
        replica.fault = str(changed)  # its scores compare with no other shard's
        return down(self.name, changed)

    def close(self) -> None:
        """Close idle connections."""
        for replica in self.replicas:
            replica.close()

    def _choose(self, tried: Sequence[Replica]) -> Replica | None:
        """Return the server to ask: ready before not ready, then the one with the least to do."""
        self._turn += 1
        left = [each for each in self.replicas if each not in tried and self._fits(each)]
        number = len(left)
        if not number:
            return None
        turns = range(self._turn, self._turn + number)
        return min(
            (left[turn % number] for turn in turns),
            key=lambda each: (each.fault is not None, each.num_running),
        )

    def _fits(self, replica: Replica) -> bool:
        """Whether its scores compare with the other shards'."""
        return replica.held is not None and self._scorer in (None, replica.held.scorer)

    def _lost(self, replica: Replica, error: Exception) -> None:
        replica.fault = str(error) or type(error).__name__
        self._on_change(error)


def _refused(name: str, reply: Reply) -> Refusal:
    """Return what a server's refusal becomes here."""
    body = _decoded(reply.body)
    said = str(body.get("message") or f"status {reply.status}")
    if reply.status == 429:
        retry_after = reply.headers.get(b"retry-after", b"1").decode("latin-1")
        headers = {"retry-after": retry_after}
        return Refusal(429, said, reason="overloaded", headers=headers)
    if reply.status in (422, 413, 504):
        reason = "deadline" if reply.status == 504 else "invalid"
        return Refusal(reply.status, said, reason=reason)
    if reply.status == 503:
        return down(name, said)
    cause = ConnectionError(f"{name}: status {reply.status}: {said}")
    return Refusal(502, f"{name} failed", reason="shard", cause=cause)


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
