"""`RoutingService`: the surface of `ScoringService`, over shards that score elsewhere."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from math import inf
from time import monotonic, perf_counter
from typing import Any

import numpy as np

from ....arguments import Arguments
from ....arrays import Int64
from ....errors import EngineError, RequestError
from ...store.ids import digests_of
from ..answers import Answer, Stages, Unknown
from ..identity import Identity
from ..limits import Load, ServiceOptions, UnknownIdsError
from ..refusals import Refusal
from .contract import Shard, down, is_down
from .counters import Counters
from .knowledge import Knowledge, learn
from .merge import Parts, merge
from .table import NOWHERE
from .wire import Message, Scores, message_of, scores_of

# A partial answer is put together before its deadline: a shard gets a little less time.
_SHARE_OF_SHARDS = 0.95
_NOTHING: Int64 = np.empty(0, np.int64)


class RoutingService:
    """Ranks over shards. Safe from any thread; has no engine, no store and no state on disk.

    A request runs on the event loop of whoever submits it; without one, on a loop of the service's
    own thread.

    Attributes:
        options: as given.
        num_dropped: 0: the shards count what they drop.
        store: None: the ids lie with the shards.
    """

    num_dropped = 0
    store = None

    def __init__(
        self,
        shards: Sequence[Shard],
        options: ServiceOptions,
        counters: Counters,
        *,
        partial: bool = False,
    ):
        """Ask all shards what they hold; those that do not answer are asked again at each probe.

        Args:
            partial: answer without shards that are down even where the caller does not ask for it.

        Raises:
            EngineError: the shards have several scorers.
        """
        self.options, self._partial = options, partial
        self._shards, self._counters = shards, counters
        self._running: set[Future[Answer]] = set()
        self._num_pairs = 0
        self._closing = False
        self._changed = threading.Condition()
        self._aside: asyncio.AbstractEventLoop | None = None
        self._askers = ThreadPoolExecutor(len(shards), thread_name_prefix="edje-shards")
        self._known = Knowledge.nothing(shards)
        try:
            self._look(10.0, strict=True)
        except BaseException:
            self.close(0.0)
            raise

    def submit(
        self,
        query: str,
        candidates: Iterable[str] | Int64,
        *,
        top_n: int | None = None,
        timeout_s: float | None = None,
        unknown: Unknown | None = None,
        partial: bool = False,
        wake: bool = True,
    ) -> Future[Answer]:
        """Send a query's candidates to the shards that hold them; return at once.

        Args:
            candidates: ids.
            top_n: how many hits to return; None: all.
            timeout_s, unknown: None: as the service's options say.
            partial: an answer without shards that are down will do; it names them.
            wake: there is nothing to wake: each request is sent by itself.

        Returns:
            The answer to come. `cancel()` closes the connections to the shards, which then drop
            what they have not scored. It fails with a Refusal or with UnknownIdsError.

        Raises:
            UnknownIdsError: ids that no shard holds.
            RequestError: no ids.
            EngineError: the service is closed.
            Refusal: 503, a shard has not told its ids yet, and may hold some of these.
        """
        began = perf_counter()
        ids = _ids_of(candidates)
        if self._closing:
            raise EngineError("the service is closing", hint="send the request again")
        rule, partial = unknown or self.options.unknown, partial or self._partial
        parts, messages = self._split(query, ids, rule, partial)
        limit = self.options.timeout_s if timeout_s is None else timeout_s
        deadline = monotonic() + limit * (_SHARE_OF_SHARDS if partial else 1.0)
        known = self._known
        stages = Stages(resolve=(perf_counter() - began) * 1e3)

        async def run() -> Answer:
            await self._scatter(parts, messages, deadline, partial)
            stages.compute = (perf_counter() - began) * 1e3 - stages.resolve
            answer = merge(
                parts,
                top_n=top_n,
                unknown=rule,
                engine=known.engine,
                stages=stages,
                began=began,
                hidden_by=known.silent,
            )
            if answer.unreached:
                self._counters.partial.inc()
            return answer

        return self._start(run(), len(ids))

    def wake(self) -> None:
        """Do nothing: what was submitted has begun."""

    def load(self) -> Load:
        """Return what is on its way to the shards; what waits there they know themselves."""
        return Load(len(self._running), self._num_pairs, 0.0)

    def probe(self, timeout_s: float = 10.0) -> None:
        """Ask all shards how they are and, where that changed, what they hold.

        Raises:
            PassingError: a shard has no ready server (with `partial`: none has).
        """
        self._look(timeout_s)
        self._known.check_ready(self._shards, partial=self._partial)

    def facts(self) -> dict[str, Any]:
        """Return what the shards say of themselves, and how many ids they hold together."""
        return self._known.facts(self._shards)

    def identity(self) -> Identity | None:
        """Return None: the ids lie with the shards."""
        return None

    def close(self, drain_s: float = inf) -> None:
        """Refuse new requests, wait for those on their way, close all connections."""
        self._closing = True
        with self._changed:
            limit = None if drain_s == inf else drain_s
            self._changed.wait_for(lambda: not self._running, limit)
            left = list(self._running)
        for future in left:
            with suppress(Exception):  # answered meanwhile
                future.set_exception(EngineError("the service is closing"))
        for shard in self._shards:
            shard.close()
        self._askers.shutdown(wait=False, cancel_futures=True)
        if self._aside is not None:
            self._aside.call_soon_threadsafe(self._aside.stop)

    def _look(self, timeout_s: float, *, strict: bool = False) -> None:
        """Ask all shards at once, and take over what they say."""
        list(self._askers.map(lambda shard: shard.look(timeout_s), self._shards))
        self._known = learn(self._shards, self._known, strict=strict)
        for shard in self._shards:
            self._counters.ready.labels(shard.name).set(shard.num_ready)
        self._counters.ids.set(self._known.table.num_ids)

    def _split(
        self, query: str, ids: list[str], rule: Unknown, partial: bool
    ) -> tuple[Parts, list[tuple[Shard, Message]]]:
        """Find each id's shard and write what the shards are sent.

        Raises:
            UnknownIdsError, Refusal: as `submit`.
        """
        known = self._known
        places = known.table.find(digests_of(ids)[:, 1])
        lost = np.flatnonzero(places == NOWHERE)
        hidden = _NOTHING
        if len(lost) and known.silent:
            if not partial:
                raise down(known.silent, "it has not told its ids yet")
            lost, hidden = hidden, lost
        if len(lost) and rule == "error":
            raise UnknownIdsError([(at, ids[at]) for at in lost.tolist()])
        encoded = [one.encode("utf-8", "replace") for one in ids]
        text = query.encode("utf-8", "replace")
        sent, messages, names = [], [], []
        for place, shard in enumerate(self._shards):
            positions = np.flatnonzero(places == place)
            if len(positions):
                sent.append(positions)
                names.append(shard.name)
                chosen = [encoded[at] for at in positions.tolist()]
                messages.append((shard, message_of(text, chosen)))
        return Parts(ids, sent, [None] * len(sent), names, lost, hidden), messages

    async def _scatter(
        self,
        parts: Parts,
        messages: list[tuple[Shard, Message]],
        deadline: float,
        partial: bool,
    ) -> None:
        """Ask all shards at once; the first that fails ends the request, unless `partial`."""
        tasks = [
            asyncio.ensure_future(self._ask(shard, message, deadline, len(positions)))
            for (shard, message), positions in zip(messages, parts.sent, strict=True)
        ]
        if not tasks:
            return
        until = asyncio.ALL_COMPLETED if partial else asyncio.FIRST_EXCEPTION
        try:
            done, _ = await asyncio.wait(tasks, return_when=until)
            failures = [task.exception() for task in done if task.exception() is not None]
            for error in failures:
                assert error is not None
                if not partial or not is_down(error) or len(failures) == len(tasks):
                    raise error
            for number, task in enumerate(tasks):
                parts.scores[number] = None if task.exception() else task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(self, shard: Shard, message: Message, deadline: float, number: int) -> Scores:
        """Ask one shard, and count it."""
        counters, began, status = self._counters, perf_counter(), 499
        counters.pairs.labels(shard.name).inc(number)
        try:
            found = scores_of(await shard.ask(message, deadline), number)
            status = 200
            return found
        except Refusal as error:
            status = error.status
            raise
        finally:
            counters.requests.labels(shard.name, str(status)).inc()
            counters.seconds.labels(shard.name).observe(perf_counter() - began)

    def _start(self, work: Coroutine[Any, Any, Answer], number: int) -> Future[Answer]:
        """Run a request on the caller's event loop, or on our own; return its answer to come."""
        future: Future[Answer] = Future()
        tasks: list[asyncio.Task[None]] = []
        self._running.add(future)
        self._num_pairs += number

        async def run() -> None:
            try:
                answer = await work
            except asyncio.CancelledError:
                future.cancel()
                raise
            except Exception as error:
                with suppress(InvalidStateError):  # given up meanwhile
                    future.set_exception(error)
            else:
                with suppress(InvalidStateError):
                    future.set_result(answer)

        def start() -> None:
            tasks.append(loop.create_task(run()))

        def stop() -> None:
            for task in tasks:
                task.cancel()

        def forget(_: Future[Answer]) -> None:
            with self._changed:
                self._running.discard(future)
                self._num_pairs -= number
                self._changed.notify_all()
            if not loop.is_closed():
                loop.call_soon_threadsafe(stop)

        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = self._own_loop()
            loop.call_soon_threadsafe(start)
        else:
            start()
        future.add_done_callback(forget)
        return future

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop of our own thread, for callers that have none."""
        with self._changed:
            if self._aside is None:
                self._aside = asyncio.new_event_loop()
                threading.Thread(
                    target=self._aside.run_forever, name="edje-route", daemon=True
                ).start()
            return self._aside


def _ids_of(candidates: Iterable[str] | Int64) -> list[str]:
    if isinstance(candidates, np.ndarray):
        raise RequestError("rows are of one store, and there are several: send ids")
    given = Arguments("RoutingService.submit")
    ids = given.strings("candidates", candidates)
    given.check()
    if not ids:
        raise RequestError("there are no candidates, expected one id or more")
    return ids
