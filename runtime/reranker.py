"""`Reranker`: an engine folder and a token store in, ranked images out."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from types import TracebackType

import numpy as np
import numpy.typing as npt

from ..engines.contract import Engine, OpenOptions
from ..errors import EngineError, RequestError, StoreError
from .cascade import Cascade, check_margin, check_same_model, learned_margin
from .device.host import HostDevice
from .lane import Lane
from .pipeline import Pipeline, Request, Scored
from .results import EngineLabel, Fault, Hit, RankResult, Rescoring, StageTimes
from .store import TokenStore
from .text import QueryTokenizer
from .token_source import TokenSource, float16_tokens

StrPath = str | os.PathLike[str]


class Reranker:
    """Score (query, image) pairs with one engine over one store. Safe to share between threads.

    With a second, precise engine (`rescore`) it is a cascade: `rank` returns the precise engine's
    top k with its scores, but lets it score only the images that the first, fast engine cannot
    rule out. Make it with `Reranker.open`; end it with `close` or a `with` block.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: QueryTokenizer,
        store: TokenStore,
        *,
        rescore: Engine | None = None,
        rescore_margin: float | None = None,
    ):
        """Join opened parts. `close` closes the engines; the store stays the caller's.

        Raises:
            StoreError: the store was made by another encoder, or holds other tokens.
            EngineError: the engines are of two models, or no margin was given or can be learned.
            RequestError: `rescore_margin` is negative, not finite or without `rescore`.
        """
        check_store(engine, store)
        margin = _margin(engine, rescore, rescore_margin)
        self._engines = [engine] if rescore is None else [engine, rescore]
        self._tokenizer = tokenizer
        self._store = store
        self._owns_store = False
        self._device = HostDevice()
        lane = Lane(self._device)
        fast = Pipeline(engine, _source(engine, store), self._device, lane=lane)
        self._pipelines = [fast]
        self._labels = [_label(each, store, self._device.name) for each in self._engines]
        self._cascade: Cascade | None = None
        if rescore is not None:
            precise = Pipeline(rescore, _source(rescore, store), self._device, lane=lane)
            self._pipelines.append(precise)
            self._cascade = Cascade(fast, precise, self._labels[-1], margin)
        self._process = os.getpid()
        self._idle = threading.Condition()
        self._num_running = 0
        self._closed = False

    @classmethod
    def open(
        cls,
        engine: StrPath,
        *,
        store: StrPath | TokenStore,
        rescore: StrPath | None = None,
        rescore_margin: float | None = None,
        num_threads: int | None = None,
        backend_settings: Mapping[str, str] | None = None,
    ) -> Reranker:
        """Open the engine folder `engine` over a token store.

        Args:
            engine: folder written by `edje build`.
            store: folder of a token store, opened for reading and closed with the reranker;
                or an open `TokenStore`, which stays the caller's.
            rescore: folder of a more precise engine of the same bundle, whose top k `rank` then
                returns and whose scores `predict` returns.
            rescore_margin: raw logits by which a score of `engine` may lie below that of
                `rescore`; None takes it from the fidelity that was measured at build.
            num_threads: CPU threads of an engine; None leaves the choice to the backend.
            backend_settings: settings handed to the backend (of both engines) as they are.

        Raises:
            EngineError: no engine there, one that is stale on this machine, engines of two
                models, or no margin was given or can be learned.
            StoreError: no store there, or one made by another encoder.
            RequestError: `rescore_margin` is negative, not finite or without `rescore`.
        """
        from ..engines.open import open_engine

        folder = Path(engine)
        options = OpenOptions(num_threads, backend_settings or {})
        with ExitStack() as undo:
            opened = store if isinstance(store, TokenStore) else TokenStore.open(store)
            if opened is not store:
                undo.callback(opened.close)
            model = open_engine(folder, options)
            undo.callback(model.close)
            precise = None if rescore is None else open_engine(Path(rescore), options)
            if precise is not None:
                undo.callback(precise.close)
            tokenizer = QueryTokenizer.open(folder, model.manifest.bundle.text)
            reranker = cls(model, tokenizer, opened, rescore=precise, rescore_margin=rescore_margin)
            undo.pop_all()
        reranker._owns_store = opened is not store
        return reranker

    def rank(
        self, query: str, candidates: Sequence[str] | None = None, top_k: int | None = None
    ) -> RankResult:
        """Rank `candidates` (ids of the store) for `query`, best first.

        Args:
            query: plain text; special tokens in it have no meaning.
            candidates: ids, duplicates allowed (equal scores); None ranks the whole store.
            top_k: how many hits to return; None returns all. A cascade needs it: without, or
                with as many images as that, the precise engine alone scores everything.

        Raises:
            RequestError: an empty query, ids the store does not hold (all named, up to 20), or a
                `top_k` below 1.
            EngineError: the engine failed or the reranker is closed.
            StoreError: the store cannot be read.
        """
        with self._running():
            began = perf_counter()
            _check_top_k(top_k)
            queries = self._tokenizer([query])
            tokenized = perf_counter()
            ids = self._store.ids() if candidates is None else _checked_ids(candidates)
            rows, place = np.unique(self._store.rows(ids), return_inverse=True)
            resolved = perf_counter()
            request = Request(queries, np.zeros(len(rows), np.int64), rows)
            scored, label, rescoring = self._score(request, top_k)
            return RankResult(
                _hits(ids, scored.scores[place], top_k),
                _faults(ids, scored, place),
                bool(queries.truncated[0]),
                _times(began, tokenized, resolved, scored),
                label,
                rescoring,
            )

    def predict(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """Score (query, id) pairs of any number of queries; a cascade's precise engine does it.

        Returns:
            float32 [N]: raw logits in the order of `pairs`, owned by the caller.

        Raises:
            RequestError: an empty query, or ids the store does not hold.
            EngineError: the engine failed or the reranker is closed.
            StoreError: a stored record is damaged or gave no finite score (all named).
        """
        with self._running():
            texts, ids = _split_pairs(pairs)
            if not ids:
                return np.empty(0, np.float32)
            number = {text: place for place, text in enumerate(dict.fromkeys(texts))}
            queries = self._tokenizer(list(number))
            asked = np.array([number[text] for text in texts], np.int64)
            pair = np.stack([asked, self._store.rows(ids)], axis=1)
            unique, place = np.unique(pair, axis=0, return_inverse=True)
            request = Request(queries, unique[:, 0].copy(), unique[:, 1].copy())
            scored = self._pipelines[-1].run(request)
            place = place.reshape(-1)
            _raise_faults(_faults(ids, scored, place))
            return scored.scores[place]

    def close(self) -> None:
        """Refuse new requests, let batches on their way finish, free everything.

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
        self._device.close()
        for engine in self._engines:
            engine.close()
        if self._owns_store:
            self._store.close()

    def __enter__(self) -> Reranker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _score(
        self, request: Request, top_k: int | None
    ) -> tuple[Scored, EngineLabel, Rescoring | None]:
        """Score one query's images; say which engine scored all, and how a cascade went on."""
        if self._cascade is None or top_k is None or top_k >= len(request.rows):
            return self._pipelines[-1].run(request), self._labels[-1], None
        scored, rescoring = self._cascade.run(request, top_k)
        return scored, self._labels[0], rescoring

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Count a request, so that `close` can wait for it."""
        self._pipelines[0].check()  # before any lock: a forked child may have got it locked
        with self._idle:
            if self._closed:
                raise EngineError("the reranker is closed", hint="open it again: Reranker.open")
            self._num_running += 1
        try:
            yield
        finally:
            with self._idle:
                self._num_running -= 1
                self._idle.notify_all()


def check_store(engine: Engine, store: TokenStore) -> None:
    """Check that `store` holds what `engine` was trained to read.

    An engine that takes float16 tokens reads an int8 store as well (see `Float16Tokens`).

    Raises:
        StoreError: another encoder made the tokens (both fingerprints named), their shape
            differs, or the engine takes int8 tokens and the store holds none.
    """
    bundle, layout = engine.manifest.bundle, store.layout
    faults = []
    if layout.fingerprint_encoder != bundle.fingerprint_encoder:
        faults.append(
            f"encoder: the store's is {layout.fingerprint_encoder}, "
            f"the engine's is {bundle.fingerprint_encoder}"
        )
    got, expected = store.record_shape, (bundle.sizes.num_tokens, bundle.sizes.hidden)
    if got != expected:
        faults.append(
            f"tokens: the store holds {list(got)} an image, the engine reads {list(expected)}"
        )
    hint = (
        "tokens of two encoders do not compare: index the same images with this one, "
        f"edje store ids {store.path} > ids.txt && "
        "edje index ENGINE_OR_BUNDLE IMAGES --into NEW_STORE --from ids.txt"
    )
    if engine.manifest.token_dtype == "int8" and layout.dtype != "int8":
        faults.append(f"dtype: the store holds {layout.dtype} tokens, the engine reads int8 ones")
        hint += " --dtype int8; or build an engine without --tokens int8, which reads both"
    if faults:
        raise StoreError(
            f"the store {store.path} was not made for this engine", faults=faults, hint=hint
        )


def _source(engine: Engine, store: TokenStore) -> TokenSource:
    """Return what reads the store's tokens as the engine takes them."""
    return store if engine.manifest.token_dtype == "int8" else float16_tokens(store)


def _label(engine: Engine, store: TokenStore, device: str) -> EngineLabel:
    manifest = engine.manifest
    return EngineLabel(manifest.backend, manifest.precision, device, store.layout.dtype)


def _margin(engine: Engine, rescore: Engine | None, given: float | None) -> float:
    """Return a cascade's margin, as given or as learned; 0 without a cascade."""
    if rescore is None:
        if given is not None:
            raise RequestError("rescore_margin was given without rescore, the precise engine")
        return 0.0
    check_same_model(engine.manifest, rescore.manifest)
    if given is None:
        return learned_margin(engine.manifest, rescore.manifest)
    return check_margin(given)


def _check_top_k(top_k: int | None) -> None:
    if top_k is not None and top_k < 1:
        raise RequestError(f"top_k is {top_k}, expected 1 or more, or None for all")


def _checked_ids(candidates: Sequence[object]) -> list[str]:
    """Return the ids as a list; a lone string is a mistake, not a list of letters."""
    if isinstance(candidates, str):
        raise RequestError(f"candidates is the string {candidates!r}, expected a list of ids")
    wrong = [repr(candidate) for candidate in candidates if not isinstance(candidate, str)]
    if wrong:
        raise RequestError(f"{len(wrong)} candidates are not strings: {', '.join(wrong[:20])}")
    return [candidate for candidate in candidates if isinstance(candidate, str)]


def _split_pairs(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    try:
        return [query for query, _ in pairs], _checked_ids([image for _, image in pairs])
    except (TypeError, ValueError) as error:
        raise RequestError(f"pairs must be (query, id) tuples: {error}") from error


def _hits(
    ids: Sequence[str], scores: npt.NDArray[np.float32], top_k: int | None
) -> tuple[Hit, ...]:
    """Sort by descending score, ties in the order given; leave out what is not finite."""
    order = np.argsort(-scores, kind="stable")
    sound = order[np.isfinite(scores[order])][:top_k]
    places, values = sound.tolist(), scores[sound].tolist()
    return tuple(Hit(ids[i], score, i) for i, score in zip(places, values, strict=True))


def _faults(ids: Sequence[str], scored: Scored, place: npt.NDArray[np.int64]) -> tuple[Fault, ...]:
    """Name every candidate without a finite score; candidate i has the score of `place[i]`."""
    faulty = ~np.isfinite(scored.scores)
    if scored.skipped is not None:
        faulty &= ~scored.skipped
    places = np.flatnonzero(faulty[place]).tolist()
    return tuple(Fault(ids[i], _reason(scored, int(place[i])), i) for i in places)


def _reason(scored: Scored, place: int) -> str:
    why = scored.damaged.get(place)
    if why is not None:
        return f"its stored record is damaged: {why}"
    return f"its score is {scored.scores[place]}: its tokens, or the precision, overflow"


def _raise_faults(faults: Sequence[Fault]) -> None:
    if faults:
        raise StoreError(
            f"{len(faults)} pairs have no score",
            faults=[f"{fault.id!r}: {fault.reason}" for fault in faults[:20]],
            hint="`edje store verify --repair STORE` takes damaged records out; then index again",
        )


def _times(began: float, tokenized: float, resolved: float, scored: Scored) -> StageTimes:
    return StageTimes(
        tokenize=(tokenized - began) * 1e3,
        resolve=(resolved - tokenized) * 1e3,
        gather=scored.gather_ms,
        upload=scored.upload_ms,
        compute=scored.compute_ms,
        download=scored.download_ms,
        total=(perf_counter() - began) * 1e3,
    )
