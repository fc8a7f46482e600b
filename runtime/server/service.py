"""`ScoringService`: one engine and one store, the requests of many callers in shared batches.

Plain Python, no HTTP: what `edje serve` runs on, and the way to embed the runtime.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from math import inf
from time import monotonic, perf_counter
from typing import Any, get_args

import numpy as np

from ...arguments import Arguments, StrPath
from ...arrays import Int64
from ...errors import EngineError, RequestError, StoppedError
from ..pipeline import Scored
from ..reranker import Reranker
from ..results import Candidates
from ..store import TokenStore
from ..text import TokenizedQueries
from .answers import Answer, Stages, Unknown, Waiting
from .identity import Identity
from .limits import Load, PassingError, ServiceOptions, UnknownIdsError, check_load
from .worker import Worker

PROBE_QUERY = "a photo"
PROBE_TOLERANCE = 0.05  # raw logits: what a GPU's other batch sizes may change in fp16


class ScoringService:
    """Scores the requests of many callers, whose pairs share batches. Safe from any thread.

    Make it with `ScoringService.open`, or of a `Reranker`, which then stays the caller's; end it
    with `close` or a `with` or `async with` block.

    Attributes:
        options: as given.
        reranker: engine and store.
        worker: the threads; `on_batch` and `on_failure` tell what they do.
    """

    def __init__(self, reranker: Reranker, options: ServiceOptions | None = None):
        """Start the threads that form batches.

        Raises:
            RequestError: options that cannot be meant.
        """
        self.options = options or ServiceOptions()
        self.options.check()
        self.reranker = reranker
        self._owns = False
        profile = reranker.profile
        self._buckets = sorted(profile.text_buckets)
        self._max_pairs = min(self.options.max_batch_pairs or profile.max_pairs, profile.max_pairs)
        self._probe: tuple[Int64, float] | None = None
        self._live: Int64 | None = None
        self._identity: Identity | None = None
        self._entering = threading.RLock()
        self._entered = threading.Condition(self._entering)
        self._num_entering = 0
        self.worker = Worker(reranker, self._max_pairs)

    @classmethod
    def open(
        cls,
        engine: StrPath,
        *,
        store: StrPath | TokenStore,
        options: ServiceOptions | None = None,
        **opening: Any,
    ) -> ScoringService:
        """Open an engine folder over a store, warm it up, and serve it.

        Args:
            opening: as `Reranker.open` takes them.

        Raises:
            As `Reranker.open` and `warm_up`.
        """
        reranker = Reranker.open(engine, store=store, **opening)
        try:
            reranker.warm_up()
            service = cls(reranker, options)
        except BaseException:
            reranker.close()
            raise
        service._owns = True
        return service

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
        """Let a query's candidates wait for their batches; return at once.

        Args:
            candidates: ids; or int64 [N], rows of the store.
            top_n: how many hits to return; None: all.
            timeout_s: None: as the service's options say.
            unknown: None: as the service's options say.
            partial: an answer without a shard that is down will do; one engine has no shards.
            wake: begin now; False: once `wake` is called, for who submits several at a time.

        Returns:
            The answer to come. `cancel()` takes what no batch holds yet out of the queue. It fails
            with StoppedError when its time is up, EngineError when the engine fails or the service
            closes, StoreError when the store cannot be read.

        Raises:
            OverloadedError: too much waits already.
            UnknownIdsError: ids that the store lacks.
            RequestError: an empty query, no candidates, or arguments of another kind.
            EngineError: the service is closed.
        """
        began = perf_counter()
        given = Arguments("ScoringService.submit")
        given.text("query", query)
        ids = (
            candidates
            if isinstance(candidates, np.ndarray)
            else given.strings("candidates", candidates)
        )
        if top_n is not None:
            top_n = given.whole("top_n", top_n, "1 or more, or None for all")
        if timeout_s is not None:
            timeout_s = given.number("timeout_s", timeout_s, "0 or more seconds", finite=False)
        if unknown is not None:
            given.choice("unknown", unknown, get_args(Unknown))
        given.check()
        self._enter()
        try:
            check_load(self.worker.load(), self.options)
            return self._submit(query, ids, top_n, timeout_s, unknown, began, wake=wake)
        finally:
            self._leave()

    async def rank(self, query: str, candidates: Iterable[str] | Int64, **options: Any) -> Answer:
        """Rank candidates without blocking the event loop; cancelling the task drops the request.

        Args and Raises: as `submit`, and what its future fails with.
        """
        return await asyncio.wrap_future(self.submit(query, candidates, **options))

    def wake(self) -> None:
        """Begin with what was submitted with `wake=False`."""
        self.worker.wake()

    def load(self) -> Load:
        """Return what there is to do."""
        return self.worker.load()

    @property
    def store(self) -> TokenStore:
        """What it reads."""
        return self.reranker.store

    @property
    def num_dropped(self) -> int:
        """Pairs that were accepted and never scored."""
        return self.worker.num_dropped

    def facts(self) -> dict[str, Any]:
        """Return what runs here, as JSON values; nothing of paths."""
        reranker = self.reranker
        return {
            "engines": [
                {"backend": label.backend, "precision": label.precision, "layers": label.layers}
                for label in reranker.labels
            ],
            "device": reranker.labels[-1].device,
            "num_images": len(reranker.store),
            "max_input_length": max(self._buckets),
            "max_batch_pairs": reranker.profile.max_pairs,
            "fingerprint_scorer": reranker.bundle.fingerprint_scorer,
            "fingerprint_encoder": reranker.bundle.fingerprint_encoder,
        }

    def identity(self) -> Identity:
        """Return which scores this service gives, and for which ids; made on the first call."""
        if self._identity is None:
            scorer, store = self.reranker.bundle.fingerprint_scorer, self.reranker.store
            self._identity = Identity.of(scorer, store.digests())
        return self._identity

    def probe(self, timeout_s: float = 10.0) -> None:
        """Score a known pair through the queue, and compare with what it scored at first.

        Raises:
            PassingError: none in time, while others got theirs.
            EngineError: no score, another one, or none in time; the service cannot be trusted.
            StoreError: the record cannot be read.
        """
        if self._probe is None:
            live = self.reranker.store.live_rows()[:1]
            if not len(live):
                return
            first = self._probe_score(live, timeout_s)
            self._probe = live, first
            return
        rows, expected = self._probe
        found = self._probe_score(rows, timeout_s)
        if not abs(found - expected) <= PROBE_TOLERANCE:
            raise EngineError(
                f"the engine scores a known pair {found:.4f}, expected {expected:.4f}",
                hint="restart it; if that happens again, `edje verify` the engine",
            )

    def close(self, drain_s: float = inf) -> None:
        """Refuse new requests, finish those accepted, free everything. May be called twice.

        Args:
            drain_s: how long to wait for accepted requests; what is left then fails with
                EngineError.
        """
        self.worker.close(drain_s)
        with self._entered:  # it looks ids up in the store, which is about to go
            self._entered.wait_for(lambda: not self._num_entering)
        if self._owns:
            self.reranker.close()

    def __enter__(self) -> ScoringService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> ScoringService:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def _submit(
        self,
        query: str,
        ids: list[str] | Int64,
        top_n: int | None,
        timeout_s: float | None,
        unknown: Unknown | None,
        began: float,
        *,
        urgent: bool = False,
        wake: bool = True,
    ) -> Future[Answer]:
        """Let checked arguments wait."""
        queries = self.reranker.tokenizer([query])
        tokenized = perf_counter()
        asked = self._find(ids, unknown or self.options.unknown)
        stages = Stages(
            tokenize=(tokenized - began) * 1e3, resolve=(perf_counter() - tokenized) * 1e3
        )
        future: Future[Answer] = Future()
        num_pairs = len(asked.rows)
        job = Waiting(
            self._bucket_of(queries),
            num_pairs,
            monotonic() + (self.options.timeout_s if timeout_s is None else timeout_s),
            urgent=urgent,
            steps=self.reranker.steps(num_pairs, top_n),
            future=future,
            queries=queries,
            asked=asked,
            top_n=top_n,
            unknown=unknown or self.options.unknown,
            began=began,
            stages=stages,
            scored=Scored(np.empty(num_pairs, np.float32), {}),
        )
        job.go_on()
        if not num_pairs:  # none of them is in the store
            future.set_result(job.answer(self.reranker.labels[-1]))
            return future
        self.worker.add(job, wake=wake)
        return future

    def _enter(self) -> None:
        """Count a request that is not in the queue yet, so that `close` can wait for it.

        Raises:
            EngineError: the service is closed; there is nothing to leave.
        """
        with self._entering:
            self.worker.check_open()
            self._num_entering += 1

    def _leave(self) -> None:
        with self._entering:
            self._num_entering -= 1
            if not self._num_entering:
                self._entered.notify_all()

    def _find(self, candidates: list[str] | Int64, unknown: Unknown) -> Candidates:
        """Return the candidates' rows."""
        if isinstance(candidates, np.ndarray):
            return self._find_rows(candidates)
        if not candidates:
            raise RequestError("there are no candidates, expected one id or more")
        asked = Candidates.find(self.reranker.store, candidates, "skip")
        if unknown == "error" and not asked.is_whole:
            missing = np.flatnonzero(asked.position < 0).tolist()
            raise UnknownIdsError([(i, candidates[i]) for i in missing])
        return asked

    def _find_rows(self, rows: Int64) -> Candidates:
        if rows.ndim != 1 or rows.dtype != np.int64 or not len(rows):
            raise RequestError(
                f"rows are {rows.dtype} {list(rows.shape)}, expected int64 [N] of one or more"
            )
        if self._live is None:
            self._live = np.sort(self.reranker.store.live_rows())
        at = np.searchsorted(self._live, rows)
        known = self._live[np.minimum(at, len(self._live) - 1)] == rows
        if not known.all():
            missing = np.flatnonzero(~known).tolist()
            raise UnknownIdsError([(i, f"row {rows[i]}") for i in missing])
        each, position = np.unique(rows, return_inverse=True)
        return Candidates(list(map(str, rows.tolist())), each, position)

    def _bucket_of(self, queries: TokenizedQueries) -> int:
        length = int(queries.text_length[0])
        for bucket in self._buckets:
            if length <= bucket:
                return bucket
        raise RequestError(
            f"the engine takes queries of up to {self._buckets[-1] - 2} wordpieces, got "
            f"{length - 2}",
            hint="build the engine with a larger --text-buckets value",
        )

    def _probe_score(self, rows: Int64, timeout_s: float) -> float:
        num_batches = self.worker.num_batches
        try:
            self._enter()
            try:
                now = perf_counter()
                future = self._submit(PROBE_QUERY, rows, None, timeout_s, None, now, urgent=True)
            finally:
                self._leave()
            answer = future.result(timeout_s)
        except (StoppedError, FutureTimeoutError, CancelledError) as late:
            is_busy = self.worker.num_batches > num_batches  # slow, and no sign of death
            kind = PassingError if is_busy else EngineError
            raise kind(f"no score within {timeout_s:g} s") from late
        if not len(answer.logits):
            raise EngineError(f"a known pair has no score: {answer.errors[0].reason}")
        return float(answer.logits[0])
