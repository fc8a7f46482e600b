"""`Reranker`: an engine folder and a token store in, ranked images out."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, get_args

import numpy as np
import numpy.typing as npt

from ..arguments import Arguments, StrPath
from ..engines.contract import Engine
from ..errors import EngineError, RequestError, StoppedError
from ..files import Closing
from ..kernels.device.contract import Device, DeviceUsage
from ..kernels.device.host import HostDevice
from .opening import OpenArguments, RunOptions, open_pipelines
from .pipeline import Request, Scored
from .residency import Place, ResidencyOptions
from .results import (
    Candidates,
    EngineLabel,
    Missing,
    RankResult,
    StageTimes,
    deadline_of,
    faults_of,
    raise_faults,
    split_pairs,
)
from .source import check_store
from .store import TokenStore
from .text import QueryTokenizer

if TYPE_CHECKING:
    from .cascade import Steps
    from .graphs import GraphReport


class Reranker(Closing):
    """Score (query, image) pairs with one engine over one store. Safe to share between threads.

    With more precise engines behind it (`rescore`) it is a cascade: `rank` returns the last one's
    top k with its scores, but lets it score only the images that those before it cannot rule out.
    Make it with `Reranker.open`; end it with `close` or a `with` block.

    Attributes:
        tokenizer, store: as given.
        labels: of the engines, the first one first.
        profile, bundle: limits of the last one, and the model that all were built from.
        residency: where the tokens are read from, and why.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: QueryTokenizer,
        store: TokenStore,
        *,
        rescore: Engine | Sequence[Engine] | None = None,
        rescore_margin: float | None = None,
        recall: float | None = None,
        runs: RunOptions | None = None,
    ):
        """Join opened parts. `close` closes the engines; device and store stay the caller's.

        Args:
            store: loaded into memory where `runs` wants that.
            rescore, rescore_margin, recall: see `open`.
            runs: where and how the engines run; None: on the host, as the store reads.

        Raises:
            StoreError: the store was made by another encoder, or holds other tokens.
            EngineError: the engines are of two models, no margin was given or can be learned, or
                the device gives no stream or not enough memory.
            RequestError: `rescore_margin` or `recall` that cannot be meant, or without `rescore`;
                or tokens cannot be read from where `runs` wants them.
        """
        check_store(engine, store)
        runs = runs or RunOptions()
        behind = [rescore] if isinstance(rescore, Engine) else list(rescore or ())
        self._engines = [engine, *behind]
        for name, value in {"rescore_margin": rescore_margin, "recall": recall}.items():
            if value is not None and not behind:
                raise RequestError(f"{name} was given without rescore, the precise engine")
        manifests = [each.manifest for each in self._engines]
        if behind:
            from .cascade import Cascade, hops_of

            hops = hops_of(manifests, rescore_margin, recall)
        self.tokenizer = tokenizer
        self.store = store
        self._process = os.getpid()
        self._counting = threading.RLock()
        self._idle = threading.Condition(self._counting)
        self._num_running = 0
        self._closed = False
        with ExitStack() as undo:
            self._device: Device = HostDevice() if runs.device is None else runs.device
            if runs.device is None:
                undo.callback(self._device.close)
            self._pipelines, self.residency, hidden = open_pipelines(
                self._engines, store, self._device, tokenizer, runs
            )
            self._owned = undo.pop_all()
        where = self._device.name, store.layout.dtype, self.residency.place
        self.profile, self.bundle = manifests[-1].profile, manifests[-1].bundle
        self.labels = [EngineLabel.of(each.manifest, *where) for each in self._engines]
        self._cascade = Cascade(self._pipelines, self.labels, hops, hidden) if behind else None

    @classmethod
    def open(
        cls,
        engine: StrPath,
        *,
        store: StrPath | TokenStore,
        rescore: StrPath | Sequence[StrPath] | None = None,
        rescore_margin: float | None = None,
        recall: float | None = None,
        num_threads: int | None = None,
        backend_settings: Mapping[str, str] | None = None,
        device: str | Device | None = None,
        stream: object | None = None,
        residency: Place | ResidencyOptions | None = None,
        graphs: bool = True,
    ) -> Reranker:
        """Open the engine folder `engine` over a token store.

        Args:
            engine: folder written by `edje build`.
            store: folder of a token store, opened for reading and closed with the reranker; or an
                open `TokenStore`, which stays the caller's.
            rescore: folder of a more precise engine of the same bundle, whose top k `rank` then
                returns and whose scores `predict` returns; or several, each more precise.
            rescore_margin: raw logits by which a score of `engine` may lie below that of
                `rescore`; None takes it from the fidelity that was measured at build, and searches
                a shallow engine's order by depth.
            recall: rescore a fixed share of the candidates, which held this recall of the top k on
                the queries that the engine was measured on; None makes sure of the top k.
            num_threads: CPU threads of an engine; None leaves the choice to the backend.
            backend_settings: settings handed to the backend (of both engines) as they are.
            device: by name (see `open_device`), or an open `Device`, which stays the caller's;
                None: what the engine was built for.
            stream: the caller's own CUDA stream to compute on (torch, cupy, pycuda), which
                outlives the reranker; no graphs are captured on it.
            residency: where tokens are read from: `disk`, `host` (loaded now), `device`, `auto`
                (measured now), or options that say more; None: `disk`, or as the open store reads.
            graphs: let a GPU run batches of sizes that come again as CUDA graphs.

        Raises:
            EngineError: no engine there, one that is stale on this machine, engines of two
                models, no margin was given or can be learned, or no such device.
            StoreError: no store there, or one made by another encoder.
            RequestError: an argument of another kind, or that cannot be meant so (all of them).
        """
        return cls._open(
            OpenArguments(
                engine,
                store,
                rescore,
                rescore_margin,
                recall,
                num_threads,
                backend_settings,
                device,
                stream,
                residency,
                graphs,
            )
        )

    @classmethod
    def _open(cls, arguments: OpenArguments) -> Reranker:
        """Open all parts; the reranker closes those that were not the caller's."""
        arguments.check()
        with ExitStack() as undo:
            store, device = arguments.open_store(undo), arguments.open_device(undo)
            with device.current():
                engine = arguments.open_engine(arguments.engine, undo)
                rescore = [arguments.open_engine(each, undo) for each in arguments.rescoring]
            reranker = cls(
                engine,
                QueryTokenizer.open(arguments.engine, engine.manifest.bundle.text),
                store,
                rescore=rescore,
                rescore_margin=arguments.rescore_margin,
                recall=arguments.recall,
                runs=arguments.runs(device),
            )
            reranker._owned.push(undo.pop_all())
        return reranker

    def rank(
        self,
        query: str,
        candidates: Iterable[str] | None = None,
        top_k: int | None = None,
        *,
        missing: Missing = "error",
        timeout_s: float | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> RankResult:
        """Rank `candidates` (ids of the store) for `query`, best first.

        Args:
            query: plain text; special tokens in it have no meaning.
            candidates: ids, any iterable, duplicates allowed (equal scores); None ranks the whole
                store.
            top_k: how many hits to return; None returns all. A cascade needs it: without, or
                with as many images as that, the precise engine alone scores everything.
            missing: what ids that the store does not hold do: `error` refuses the request, `skip`
                ranks the others and names these in the result's `missing`.
            timeout_s: seconds after which no further batch is started; None: no limit.
            cancelled: asked before each batch, on this thread; True ends the request.

        Raises:
            StoppedError: the time was up, or the caller cancelled; `partial` is the ranking of
                what was scored so far (of a cascade: by the fast engine).
            RequestError: an empty query, ids the store does not hold (all named, up to 20), or
                arguments of another kind (all of them).
            EngineError: the engine failed or the reranker is closed.
            StoreError: the store cannot be read.
        """
        began = perf_counter()
        given = Arguments("Reranker.rank")
        given.text("query", query)
        ids = None if candidates is None else given.strings("candidates", candidates)
        if top_k is not None:
            top_k = given.whole("top_k", top_k, "1 or more, or None for all")
        given.choice("missing", missing, get_args(Missing))
        deadline = deadline_of(given, timeout_s, cancelled)
        given.check()
        with self._running():
            queries = self.tokenizer([query])
            tokenized = perf_counter()
            ids = self.store.ids() if ids is None else ids
            asked = Candidates.find(self.store, ids, missing)
            times = partial(StageTimes.of, began, tokenized, perf_counter())
            alone = np.zeros(len(asked.rows), np.int64)
            request = Request(queries, alone, asked.rows, deadline, cancelled)
            return self._ranked(request, asked, top_k, times)

    def predict(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        timeout_s: float | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Score (query, id) pairs of any number of queries; a cascade's precise engine does it.

        Args:
            pairs: any iterable; none may be missing in the store.
            timeout_s, cancelled: as in `rank`.

        Returns:
            float32 [N]: raw logits in the order of `pairs`, owned by the caller.

        Raises:
            StoppedError: the time was up, or the caller cancelled; `partial` is what it would have
                returned, NaN for pairs without a score.
            RequestError: an empty query, ids the store does not hold, or arguments of another
                kind (all of them).
            EngineError: the engine failed or the reranker is closed.
            StoreError: a stored record is damaged or gave no finite score (all named).
        """
        given = Arguments("Reranker.predict")
        texts, ids = split_pairs(given, pairs)
        deadline = deadline_of(given, timeout_s, cancelled)
        given.check()
        with self._running():
            if not ids:
                return np.empty(0, np.float32)
            number = {text: index for index, text in enumerate(dict.fromkeys(texts))}
            queries = self.tokenizer(list(number))
            asked = np.array([number[text] for text in texts], np.int64)
            pair = np.stack([asked, self.store.rows(ids)], axis=1)
            unique, position = np.unique(pair, axis=0, return_inverse=True)
            columns = unique[:, 0].copy(), unique[:, 1].copy()
            request = Request(queries, *columns, deadline, cancelled)
            position = position.reshape(-1)
            try:
                scored = self._pipelines[-1].run(request)
            except StoppedError as stop:
                known = stop.partial.scores[position]
                raise _stopped(stop, known, int(np.isfinite(known).sum()), len(known)) from None
            raise_faults(faults_of(ids, scored, position))
            return scored.scores[position]

    def score(self, request: Request, stage: int = -1) -> Scored:
        """Score with one engine; one batch of one text bucket's queries and `max_pairs` pairs.

        Raises:
            As `rank`; what was stopped has its `Scored` as `partial`.
        """
        with self._running():
            return self._pipelines[stage].run(request)

    def steps(self, num_pairs: int, top_k: int | None) -> Steps | None:
        """Return what a cascade wants scored of one query, step by step; None: all by the last."""
        if top_k is None or self._cascade is None or top_k >= num_pairs:
            return None
        return self._cascade.steps(num_pairs, top_k)

    def warm_up(self, query: str | None = None) -> None:
        """Score a full batch of every text bucket, twice: allocate, compile and capture now.

        Otherwise the first requests of each length pay for it. The images are drawn at random.

        Args:
            query: warm up for this text only, on one image: for a process of one request.

        Raises:
            As `rank`.
        """
        with self._running():
            rows = self.store.live_rows()
            for pipeline in self._pipelines if len(rows) else ():
                if query is None:
                    pipeline.warm_up(np.random.default_rng(0).choice(rows, pipeline.max_pairs))
                else:
                    alone = np.zeros(1, np.int64)
                    pipeline.run(Request(self.tokenizer([query]), alone, rows[:1]))

    def graphs(self) -> tuple[GraphReport, ...]:
        """Return what was captured, launched and run plainly, and why: one report an engine."""
        return tuple(pipeline.graphs for pipeline in self._pipelines)

    def usage(self) -> DeviceUsage:
        """Return what the device has made and not freed: memory, streams, events, graphs."""
        return self._device.usage()

    def close(self) -> None:
        """Refuse requests, let batches on their way finish, free all but what a given device holds.

        A request that still needs batches fails with EngineError. May be called twice. In a
        forked child it does nothing: everything belongs to the process that opened it.
        """
        if os.getpid() != self._process:
            return
        with self._idle:
            if self._closed:
                return
            self._closed = True
            for pipeline in self._pipelines:
                pipeline.close()
            self._idle.wait_for(lambda: self._num_running == 0)
        with self._owned, ExitStack() as entered:
            with suppress(Exception):  # a lost device cannot be entered
                entered.enter_context(self._device.current())
            for engine in self._engines:
                engine.close()

    def _ranked(
        self,
        request: Request,
        asked: Candidates,
        top_k: int | None,
        times: Callable[[Scored], StageTimes],
    ) -> RankResult:
        """Score one query's images and rank them; when it is stopped, say how far it got."""
        truncated = bool(request.queries.truncated[0])
        best = 0 if top_k is None or top_k >= len(asked.rows) else top_k
        cascade = self._cascade if best else None
        label = self.labels[0 if cascade else -1]
        try:
            scored, story = cascade.run(request, best) if cascade else (self.score(request), None)
        except StoppedError as stop:
            part: Scored = stop.partial
            known = asked.result(part, top_k, truncated, times(part), label, stopped=True)
            raise _stopped(stop, known, known.num_scored, known.num_asked) from None
        return asked.result(scored, top_k, truncated, times(scored), label, story)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Count a request, so that `close` can wait for it."""
        self._pipelines[0].check()  # before any lock: a forked child may have got it locked
        with self._counting:
            if self._closed:
                raise EngineError("the reranker is closed", hint="open it again: Reranker.open")
            self._num_running += 1
        try:
            yield
        finally:
            with self._counting:
                self._num_running -= 1
                if self._closed:
                    self._idle.notify_all()


def _stopped(stop: StoppedError, known: object, num_scored: int, num_asked: int) -> StoppedError:
    """Return the error with what is known so far."""
    said = f"{stop.message}: {num_scored:,} of {num_asked:,} have a score"
    return StoppedError(said, partial=known, num_scored=num_scored, num_asked=num_asked)
