"""Candidates -> rows, scores -> hits: what a request gives back, and where its time went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import monotonic, perf_counter
from typing import Any, Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt

from ..arguments import Arguments, shown
from ..arrays import Float32, Int64
from ..engines.manifest import EngineManifest
from ..errors import StoreError
from .pipeline import Scored
from .store import TokenStore

MARGIN = "0 or more: the raw logits by which a fast score may lie below the precise one"
RECALL = "a share, more than 0 and at most 1: of the top k, what a cascade may not lose"


@dataclass(frozen=True, slots=True)
class Hit:
    """One ranked image: `score` is the raw float32 logit, `index` its position in `candidates`."""

    id: str
    score: float
    index: int


@dataclass(frozen=True, slots=True)
class Fault:
    """One candidate that was not ranked, and why; `index` is its position in `candidates`."""

    id: str
    reason: str
    index: int


@dataclass(frozen=True, slots=True)
class EngineLabel:
    """What computed the scores.

    Attributes:
        tokens: dtype of the stored tokens; float16 engines read int8 ones dequantised.
        residency: where the tokens were read from: `disk`, `host` or `device`.
        layers: `4 of 12` where it runs the first layers only; empty for a whole model.
    """

    backend: str
    precision: str
    device: str
    tokens: str = "float16"
    residency: str = "disk"
    layers: str = ""

    @classmethod
    def of(cls, manifest: EngineManifest, device: str, tokens: str, residency: str) -> EngineLabel:
        """Return the label of an engine that runs on `device`."""
        some = f"{manifest.layers} of {manifest.bundle.sizes.num_layers}"
        layers = some if manifest.is_shallow else ""
        return cls(manifest.backend, manifest.precision, device, tokens, residency, layers)


@dataclass(frozen=True, slots=True)
class Rescoring:
    """How an engine of a cascade, but for the first, made sure of the top k.

    Attributes:
        engine: it; where it is the last one, every hit's score is its own.
        num_rescored: images that it scored; duplicates among the candidates count once.
        margin: the engine before was trusted to score no image lower by more; None where the
            survivors were chosen otherwise.
        num_widened: how often this request found the margin too small, and widened it.
        total_ms: wall time of its rounds, part of the request's `total`.
        chosen: how the survivors were chosen, in words.
        before: what the engine before it did, where that was not the first.
        num_resumed: of those images, how many went on from the first engine's hidden states, which
            had stayed on the GPU.
    """

    engine: EngineLabel
    num_rescored: int
    margin: float | None
    num_widened: int
    total_ms: float
    chosen: str = ""
    before: Rescoring | None = None
    num_resumed: int = 0


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Milliseconds of one request's stages.

    `gather` (the calling thread fills slots), `upload` (to the device), `compute` (the engines
    work) and `download` (of the scores) overlap, and `total`, from call to return, includes
    waiting for other threads' batches. On a CPU nothing is copied: both copies take 0.
    """

    tokenize: float
    resolve: float
    gather: float
    upload: float
    compute: float
    download: float
    total: float

    @classmethod
    def of(cls, began: float, tokenized: float, resolved: float, scored: Scored) -> StageTimes:
        """Return the times of a request that ends now; the others as `perf_counter` counts."""
        return cls(
            tokenize=(tokenized - began) * 1e3,
            resolve=(resolved - tokenized) * 1e3,
            gather=scored.gather_ms,
            upload=scored.upload_ms,
            compute=scored.compute_ms,
            download=scored.download_ms,
            total=(perf_counter() - began) * 1e3,
        )


@dataclass(frozen=True, slots=True)
class RankResult(Sequence[Hit]):
    """The hits of one query, best first; behaves as a sequence of `Hit`.

    Attributes:
        hits: sorted by score; candidates of equal score keep the order they were given in.
        errors: candidates whose stored record is damaged or gave no finite score.
        truncated: the query had more wordpieces than the model takes; the rest was cut.
        timings_ms: where the time went.
        engine: the backend, precision and device that scored all candidates.
        rescoring: what a cascade's precise engine did; None where one engine did everything.
        missing: candidates that the store does not hold (`missing="skip"`), in their order.
        num_asked: candidates, the missing ones and each duplicate included.
        num_scored: candidates with a score, whether they are among the hits or not.
    """

    hits: tuple[Hit, ...]
    errors: tuple[Fault, ...]
    truncated: bool
    timings_ms: StageTimes
    engine: EngineLabel
    rescoring: Rescoring | None = None
    missing: tuple[Fault, ...] = ()
    num_asked: int = 0
    num_scored: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return {
            "hits": [asdict(hit) for hit in self.hits],
            "errors": [asdict(fault) for fault in self.errors],
            "missing": [asdict(fault) for fault in self.missing],
            "num_asked": self.num_asked,
            "num_scored": self.num_scored,
            "truncated": self.truncated,
            "timings_ms": asdict(self.timings_ms),
            "engine": asdict(self.engine),
            "rescoring": None if self.rescoring is None else asdict(self.rescoring),
        }

    def __len__(self) -> int:
        return len(self.hits)

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...
    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        return self.hits[index]


Missing = Literal["error", "skip"]
Value = TypeVar("Value", np.float32, np.bool_)

_NO_SCORE, _NO = np.float32(np.nan), np.bool_(False)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The images that one query ranks.

    Attributes:
        ids: as they were asked for.
        rows: int64 [U]: the store's rows of them, each once.
        position: int64 [N]: where in `rows` each candidate stands; -1: the store does not hold it.
        is_whole: whether the store holds all of them.
    """

    ids: Sequence[str]
    rows: Int64
    position: Int64
    is_whole: bool = True

    @classmethod
    def find(cls, store: TokenStore, ids: Sequence[str], missing: Missing) -> Candidates:
        """Look `ids` up.

        Raises:
            RequestError: (`error`) ids that the store does not hold.
        """
        every = store.rows(ids, missing="raise" if missing == "error" else "mark")
        rows, position = _each_once(every)
        if len(rows) and rows.item(0) < 0:  # -1 comes first
            return cls(ids, rows[1:], position - 1, is_whole=False)
        return cls(ids, rows, position)

    def missing(self) -> tuple[Fault, ...]:
        """Name the candidates that the store does not hold."""
        if self.is_whole:
            return ()
        absent = np.flatnonzero(self.position < 0).tolist()
        return tuple([Fault(self.ids[i], "it is not in the store", i) for i in absent])

    def result(
        self,
        scored: Scored,
        top_k: int | None,
        truncated: bool,
        times: StageTimes,
        engine: EngineLabel,
        rescoring: Rescoring | None = None,
        *,
        stopped: bool = False,
    ) -> RankResult:
        """Rank what was scored; `stopped`: what was skipped got no score of any engine."""
        errors, missing = faults_of(self.ids, scored, self.position), self.missing()
        num_scored = len(self.ids) - len(errors) - len(missing)
        if stopped and scored.skipped is not None:
            num_scored -= int(np.count_nonzero(_each(scored.skipped, self.position, _NO)))
        return RankResult(
            hits_of(self.ids, _each(scored.scores, self.position, _NO_SCORE), top_k),
            errors,
            truncated,
            times,
            engine,
            rescoring,
            missing,
            len(self.ids),
            num_scored,
        )


def hits_of(ids: Sequence[str], scores: Float32, top_k: int | None) -> tuple[Hit, ...]:
    """Sort by descending score, ties in the order given; leave out what is not finite.

    Only what can be among the top k is sorted: 25,000 scores take 0.04 ms instead of 1.5. The
    scores come back a batch at a time, 4 bytes a pair, while the next batch computes.
    """
    among = np.flatnonzero(np.isfinite(scores))
    if top_k is not None and top_k < len(among):
        rest = len(among) - top_k
        among = among[scores[among] >= np.partition(scores[among], rest)[rest]]
    best = among[np.argsort(-scores[among], kind="stable")[:top_k]]
    indices, values = best.tolist(), scores[best].tolist()
    return tuple(map(Hit, [ids[i] for i in indices], values, indices))


def faults_of(ids: Sequence[str], scored: Scored, position: Int64) -> tuple[Fault, ...]:
    """Name every candidate without a finite score; candidate i has the score of `position[i]`."""
    faulty = ~np.isfinite(scored.scores)
    if scored.skipped is not None:
        faulty &= ~scored.skipped
    if not faulty.any():
        return ()
    indices = np.flatnonzero(_each(faulty, position, _NO)).tolist()
    return tuple(Fault(ids[i], _reason(scored, int(position[i])), i) for i in indices)


def _each_once(rows: Int64) -> tuple[Int64, Int64]:
    """Return rows ascending and each once, and where in there each of `rows` stands."""
    order = rows.argsort()
    ascending = rows[order]
    if np.count_nonzero(ascending[1:] == ascending[:-1]):
        return np.unique(rows, return_inverse=True)
    position = np.empty(len(rows), np.int64)  # none comes twice: for a third of `unique`'s time
    position[order] = np.arange(len(rows))
    return ascending, position


def _each(values: npt.NDArray[Value], position: Int64, nothing: Value) -> npt.NDArray[Value]:
    """Return `values[position]`, and `nothing` where the position is -1."""
    return np.append(values, nothing)[position]


def _reason(scored: Scored, position: int) -> str:
    why = scored.damaged.get(position)
    if why is not None:
        return f"its stored record is damaged: {why}"
    return f"its score is {scored.scores[position]}: its tokens, or the precision, overflow"


def raise_faults(faults: Sequence[Fault]) -> None:
    """Raise one StoreError that names the faults; return when there are none."""
    if faults:
        raise StoreError(
            f"{len(faults)} pairs have no score",
            faults=[f"{fault.id!r}: {fault.reason}" for fault in faults[:20]],
            hint="`edje store verify --repair STORE` takes damaged records out; then index again",
        )


def deadline_of(
    given: Arguments, timeout_s: float | None, cancelled: Callable[[], bool] | None
) -> float | None:
    """Return when the time is up, as `time.monotonic` counts; check what else ends a request."""
    given.callback("cancelled", cancelled)
    if timeout_s is None:
        return None
    expected = "0 or more seconds, or None"
    return monotonic() + given.number("timeout_s", timeout_s, expected, finite=False)


def split_pairs(given: Arguments, pairs: object) -> tuple[list[str], list[str]]:
    """Return the queries and the ids of (query, id) pairs."""
    expected = "(query, id) tuples"
    listed = given.items("pairs", pairs, f"a list of {expected}", paired=True)
    each = [(pair, _halves(pair)) for pair in listed]
    wrong = [shown(pair) for pair, halves in each if halves is None]
    if wrong:
        given.faults.append(f"{len(wrong)} pairs are no {expected}: {', '.join(wrong[:20])}")
    halves = [both for _, both in each if both is not None]
    queries = given.strings("queries", [query for query, _ in halves])
    return queries, given.strings("ids", [image for _, image in halves])


def _halves(pair: object) -> tuple[object, object] | None:
    """Return the two parts of a pair, None for what is none: letters and sets have no order."""
    if isinstance(pair, str | bytes | Mapping | set | frozenset):
        return None
    try:
        parts = tuple(pair)  # type: ignore[arg-type, var-annotated]
    except TypeError:
        return None
    return (parts[0], parts[1]) if len(parts) == 2 else None
