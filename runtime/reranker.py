"""`Reranker`: an engine folder and a token store in, ranked images out."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ..engines.contract import Engine, OpenOptions
from ..errors import EngineError, RequestError, StoreError
from .device.host import HostDevice
from .pipeline import Pipeline, Request, Scored
from .store import TokenStore
from .text import QueryTokenizer

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Hit:
    """One ranked image: `score` is the raw float32 logit, `index` its place in `candidates`."""

    id: str
    score: float
    index: int


@dataclass(frozen=True, slots=True)
class Fault:
    """One candidate without a score, and why; `index` is its place in `candidates`."""

    id: str
    reason: str
    index: int


@dataclass(frozen=True, slots=True)
class EngineLabel:
    """What computed the scores."""

    backend: str
    precision: str
    device: str


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Milliseconds of one request's stages.

    `gather` (the calling thread fills slots) and `compute` (the engine works) overlap, and
    `total`, from call to return, includes waiting for other threads' batches.
    """

    tokenize: float
    resolve: float
    gather: float
    compute: float
    total: float


@dataclass(frozen=True, slots=True)
class RankResult(Sequence[Hit]):
    """The hits of one query, best first; behaves as a sequence of `Hit`.

    Attributes:
        hits: sorted by score; candidates of equal score keep the order they were given in.
        errors: candidates whose stored record is damaged or gave no finite score.
        truncated: the query had more wordpieces than the model takes; the rest was cut.
        timings_ms: where the time went.
        engine: the backend, precision and device that ran.
    """

    hits: tuple[Hit, ...]
    errors: tuple[Fault, ...]
    truncated: bool
    timings_ms: StageTimes
    engine: EngineLabel

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return {
            "hits": [asdict(hit) for hit in self.hits],
            "errors": [asdict(fault) for fault in self.errors],
            "truncated": self.truncated,
            "timings_ms": asdict(self.timings_ms),
            "engine": asdict(self.engine),
        }

    def __len__(self) -> int:
        return len(self.hits)

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...
    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        return self.hits[index]


class Reranker:
    """Score (query, image) pairs with one engine over one store. Safe to share between threads.

    Make it with `Reranker.open`; end it with `close` or a `with` block.
    """

    def __init__(self, engine: Engine, tokenizer: QueryTokenizer, store: TokenStore):
        """Join opened parts. `close` closes the engine; the store stays the caller's.

        Raises:
            StoreError: the store was made by another encoder, or holds other tokens.
        """
        check_store(engine, store)
        self._engine = engine
        self._tokenizer = tokenizer
        self._store = store
        self._owns_store = False
        self._device = HostDevice()
        self._pipeline = Pipeline(engine, store, self._device)
        manifest = engine.manifest
        self._label = EngineLabel(manifest.backend, manifest.precision, self._device.name)
        self._idle = threading.Condition()
        self._num_running = 0
        self._closed = False

    @classmethod
    def open(
        cls,
        engine: StrPath,
        *,
        store: StrPath | TokenStore,
        num_threads: int | None = None,
        backend_settings: Mapping[str, str] | None = None,
    ) -> Reranker:
        """Open the engine folder `engine` over a token store.

        Args:
            engine: folder written by `edje build`.
            store: folder of a token store, opened for reading and closed with the reranker;
                or an open `TokenStore`, which stays the caller's.
            num_threads: CPU threads of the engine; None leaves the choice to the backend.
            backend_settings: settings handed to the backend as they are.

        Raises:
            EngineError: no engine there, or one that is stale on this machine.
            StoreError: no store there, or one made by another encoder.
        """
        from ..engines.open import open_engine

        folder = Path(engine)
        options = OpenOptions(num_threads, backend_settings or {})
        opened = store if isinstance(store, TokenStore) else TokenStore.open(store)
        try:
            model = open_engine(folder, options)
            try:
                tokenizer = QueryTokenizer.open(folder, model.manifest.bundle.text)
                reranker = cls(model, tokenizer, opened)
            except BaseException:
                model.close()
                raise
        except BaseException:
            if opened is not store:
                opened.close()
            raise
        reranker._owns_store = opened is not store
        return reranker

    def rank(
        self, query: str, candidates: Sequence[str] | None = None, top_k: int | None = None
    ) -> RankResult:
        """Rank `candidates` (ids of the store) for `query`, best first.

        Args:
            query: plain text; special tokens in it have no meaning.
            candidates: ids, duplicates allowed (equal scores); None ranks the whole store.
            top_k: how many hits to return; None returns all.

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
            query_of_pair = np.zeros(len(rows), np.int64)
            scored = self._pipeline.run(Request(queries, query_of_pair, rows))
            return RankResult(
                _hits(ids, scored.scores[place], top_k),
                _faults(ids, scored, place),
                bool(queries.truncated[0]),
                _times(began, tokenized, resolved, scored),
                self._label,
            )

    def predict(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """Score (query, id) pairs of any number of queries.

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
            scored = self._pipeline.run(Request(queries, unique[:, 0].copy(), unique[:, 1].copy()))
            place = place.reshape(-1)
            _raise_faults(_faults(ids, scored, place))
            return scored.scores[place]

    def close(self) -> None:
        """Refuse new requests, let batches on their way finish, free everything.

        A request that still needs batches fails with EngineError. May be called twice.
        """
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._pipeline.close()
            self._idle.wait_for(lambda: self._num_running == 0)
        self._device.close()
        self._engine.close()
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

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Count a request, so that `close` can wait for it."""
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

    Raises:
        StoreError: another encoder made the tokens (both fingerprints named), or their shape or
            dtype differs.
    """
    bundle, layout = engine.manifest.bundle, store.layout
    expected = f"{engine.manifest.token_dtype} [{bundle.sizes.num_tokens}, {bundle.sizes.hidden}]"
    got = f"{layout.dtype} [{layout.num_tokens}, {layout.hidden}]"
    faults = []
    if layout.fingerprint_encoder != bundle.fingerprint_encoder:
        faults.append(
            f"encoder: the store's is {layout.fingerprint_encoder}, "
            f"the engine's is {bundle.fingerprint_encoder}"
        )
    if got != expected:
        faults.append(f"tokens: the store holds {got}, the engine reads {expected}")
    if faults:
        raise StoreError(
            f"the store {store.path} was not made for this engine",
            faults=faults,
            hint="index the images again: edje index ENGINE_OR_BUNDLE IMAGES --store NEW_STORE",
        )


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
    faulty = np.flatnonzero(~np.isfinite(scored.scores[place])).tolist()
    return tuple(Fault(ids[i], _reason(scored, int(place[i])), i) for i in faulty)


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
            hint="index these images again into a new store",
        )


def _times(began: float, tokenized: float, resolved: float, scored: Scored) -> StageTimes:
    return StageTimes(
        tokenize=(tokenized - began) * 1e3,
        resolve=(resolved - tokenized) * 1e3,
        gather=scored.gather_ms,
        compute=scored.compute_ms,
        total=(perf_counter() - began) * 1e3,
    )
