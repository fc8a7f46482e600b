"""The rerank dialects: how each client asks, and the answer that it can read.

One handler serves all. A dialect reads a body into an `Ask` and writes an `Answer` as bytes. All
answers are sorted best first but Weaviate's. Scores are the sigmoid, in float64, of the float32
logit that ranks; logits on request and in NVIDIA's dialect, whose clients merge them.

Sources: the clients' own packages and the servers that they were written for; `tests/clients`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import count
from os import urandom
from time import time
from typing import Any

import msgspec
import numpy as np

from ...arrays import Float32, Float64
from ...errors import counted
from .answers import Answer
from .asks import Ask, Fields
from .refusals import Fault

_LARGEST = 709.0  # whose exp is a float64
LOWEST_LOGIT = -1e4  # of ids that rank last: JSON has no -inf

_encode = msgspec.json.Encoder().encode
_run, _number = urandom(4).hex(), count()


class Document(msgspec.Struct, gc=False):
    """An echoed document."""

    text: str


class Scored(msgspec.Struct, omit_defaults=True, gc=False):
    """One candidate, as most dialects have it."""

    index: int
    relevance_score: float
    document: Document | None = None


class TeiScored(msgspec.Struct, omit_defaults=True, gc=False):
    """One candidate, as TEI has it."""

    index: int
    score: float
    text: str | None = None


class NvidiaScored(msgspec.Struct, gc=False):
    """One candidate, as NVIDIA has it."""

    index: int
    logit: float


class WeaviateScored(msgspec.Struct, gc=False):
    """One candidate, as Weaviate has it."""

    document: str
    score: float


def sigmoid(logits: Float32) -> Float64:
    """Return float64 [N] in 0 to 1 of logits, descending; -inf gives 0.

    Never saturates before float64 does.
    """
    values: Float64 = np.negative(logits, dtype=np.float64)
    if len(values) and values.item(-1) > _LARGEST:
        with np.errstate(over="ignore"):  # exp gives inf, and 1 / inf is the 0 that is meant
            np.exp(values, out=values)
    else:
        np.exp(values, out=values)
    values += 1.0
    return np.divide(1.0, values, out=values)


def scores_of(ask: Ask, answer: Answer) -> list[float]:
    """Return the scores as the client wants them."""
    if ask.raw:
        found: list[float] = np.maximum(answer.logits, np.float32(LOWEST_LOGIT)).tolist()
        return found
    scores: list[float] = sigmoid(answer.logits).tolist()
    return scores


def score_type(ask: Ask) -> str:
    """Return the name of the scale that the scores are on."""
    return "logit" if ask.raw else "sigmoid"


class Dialect(ABC):
    """One way to ask and to answer.

    Attributes:
        name: in metrics and logs.
    """

    name: str

    @abstractmethod
    def read(self, body: dict[str, Any], pattern: re.Pattern[str] | None) -> Ask:
        """Read what is asked for; faults are in the ask."""

    @abstractmethod
    def write(self, ask: Ask, answer: Answer, model: str) -> bytes:
        """Write the answer's body."""


class Cohere(Dialect):
    """Cohere v1 and v2, Jina, vLLM and Infinity: one superset.

    `object`, `usage`, `model` and `created` are for the last three. `errors` and `score_type` are
    our own, for who reads the native answer.
    """

    name = "cohere"
    fields: Sequence[str] = ("results",)

    def read(self, body: dict[str, Any], pattern: re.Pattern[str] | None) -> Ask:
        """Read `query`, `documents`, `top_n` (or `top_k`), `raw_scores`, `return_documents`."""
        fields = Fields(body, pattern)
        ask = fields.ask
        fields.query(body.get("query"), "query")
        fields.documents(body.get("documents"), "documents")
        fields.count("top_n", "top_k")
        ask.raw = fields.flag("raw_scores")
        activated = fields.flag("use_activation", default=True)
        ask.raw = ask.raw or not activated
        ask.echo = fields.flag("return_documents")
        ask.model = fields.text("model")
        return ask

    def write(self, ask: Ask, answer: Answer, model: str) -> bytes:
        """Write `results` (Voyage: `data`), with the usage that clients bill by."""
        positions, scores = answer.order.tolist(), scores_of(ask, answer)
        if ask.echo:
            texts = [Document(ask.ids[i]) for i in positions]
            results = list(map(Scored, positions, scores, texts))
        else:
            results = list(map(Scored, positions, scores))
        tokens = answer.num_wordpieces
        body: dict[str, Any] = {
            "id": new_id(),
            "object": "rerank",
            "created": int(time()),
            "model": ask.model or model,
            **dict.fromkeys(self.fields, msgspec.Raw(_encode(results))),
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"search_units": 1},
                "tokens": {"input_tokens": tokens, "output_tokens": 0},
                "warnings": warnings_of(answer),
            },
            "score_type": score_type(ask),
        }
        if answer.errors:
            body["errors"] = errors_of(answer)
        return _encode(body)


class Voyage(Cohere):
    """Voyage: `top_k`, `truncation`, and `data` in place of `results`."""

    name = "voyage"
    fields = ("data",)


class Either(Cohere):
    """One who reads `results` or `data` and does not say which: he finds both.

    LiteLLM's voyage provider leaves `truncation` out, as only Voyage's own clients send it; older
    LightRAG says `top_k` and reads `results`.
    """

    fields = ("results", "data")


class Tei(Dialect):
    """Hugging Face text-embeddings-inference: `texts`, and a bare array."""

    name = "tei"

    def read(self, body: dict[str, Any], pattern: re.Pattern[str] | None) -> Ask:
        """Read `query`, `texts`, `raw_scores`, `return_text`; `top_n` as some of its clients do."""
        fields = Fields(body, pattern)
        fields.query(body.get("query"), "query")
        fields.documents(body.get("texts"), "texts")
        fields.count("top_n")
        fields.ask.raw = fields.flag("raw_scores")
        fields.ask.echo = fields.flag("return_text")
        return fields.ask

    def write(self, ask: Ask, answer: Answer, model: str) -> bytes:
        """Write `[{index, score, text?}]`."""
        positions, scores = answer.order.tolist(), scores_of(ask, answer)
        if ask.echo:
            return _encode(list(map(TeiScored, positions, scores, [ask.ids[i] for i in positions])))
        return _encode(list(map(TeiScored, positions, scores)))


class Weaviate(Dialect):
    """Weaviate's `reranker-transformers`: scores in the order sent."""

    name = "weaviate"

    def read(self, body: dict[str, Any], pattern: re.Pattern[str] | None) -> Ask:
        """Read `query` and `documents`."""
        fields = Fields(body, pattern)
        fields.query(body.get("query"), "query")
        fields.documents(body.get("documents"), "documents")
        return fields.ask

    def write(self, ask: Ask, answer: Answer, model: str) -> bytes:
        """Write `{query, scores: [{document, score}]}`; what has no score gets the lowest."""
        each = in_order_given(answer, scores_of(ask, answer), 0.0)
        scores = list(map(WeaviateScored, ask.ids, each))
        return _encode({"query": ask.query, "scores": scores})


class Nvidia(Dialect):
    """NVIDIA's retrieval NIM: `passages`, and raw logits."""

    name = "nvidia"

    def read(self, body: dict[str, Any], pattern: re.Pattern[str] | None) -> Ask:
        """Read `query`, `passages`, `top_n` or `top_k`."""
        fields = Fields(body, pattern)
        fields.query(body.get("query"), "query")
        fields.documents(body.get("passages"), "passages")
        fields.count("top_n", "top_k")
        fields.ask.raw = True
        fields.ask.model = fields.text("model")
        return fields.ask

    def write(self, ask: Ask, answer: Answer, model: str) -> bytes:
        """Write `{rankings: [{index, logit}]}`."""
        rankings = list(map(NvidiaScored, answer.order.tolist(), scores_of(ask, answer)))
        tokens = answer.num_wordpieces
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _encode({"rankings": rankings, "usage": usage})


class VllmScore(Dialect):
    """vLLM's `/score`: one text against one or many, each score in the order sent."""

    name = "score"

    def read(self, body: dict[str, Any], pattern: re.Pattern[str] | None) -> Ask:
        """Read `text_1` and `text_2`, `queries` and `documents` or `items`, `data_1` and `data_2`.

        One query; a list of several with as many documents would be as many requests.
        """
        fields = Fields(body, pattern)
        query_name = next((n for n in ("text_1", "queries", "data_1") if n in body), "text_1")
        names = ("text_2", "documents", "items", "data_2")
        name = next((n for n in names if n in body), "text_2")
        query = body.get(query_name)
        if isinstance(query, list) and len(query) == 1:
            query = query[0]
        if isinstance(query, list):
            message = f"is a list of {len(query)}, expected one query: send a request for each"
            fields.ask.faults.append(Fault((query_name,), message))
        else:
            fields.query(query, query_name)
        fields.documents(body.get(name), name)
        fields.ask.raw = not fields.flag("use_activation", default=True)
        fields.ask.model = fields.text("model")
        return fields.ask

    def write(self, ask: Ask, answer: Answer, model: str) -> bytes:
        """Write `{object: "list", data: [{index, object: "score", score}]}`."""
        each = in_order_given(answer, scores_of(ask, answer), LOWEST_LOGIT if ask.raw else 0.0)
        data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(each)]
        tokens = answer.num_wordpieces
        body = {
            "id": new_id(),
            "object": "list",
            "created": int(time()),
            "model": ask.model or model,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return _encode(body)


COHERE, VOYAGE, EITHER, TEI = Cohere(), Voyage(), Either(), Tei()
WEAVIATE, NVIDIA, SCORE = Weaviate(), Nvidia(), VllmScore()


def rerank_dialect(body: dict[str, Any]) -> Dialect:
    """Return the dialect of a body sent to `/rerank`: its fields tell; null is no field."""

    get = body.get
    if get("texts") is not None:
        return TEI
    if get("property") is not None:
        return WEAVIATE
    if get("truncation") is not None:
        return VOYAGE
    if get("top_n") is not None:
        return COHERE
    is_infinity = get("raw_scores") is not None
    if get("top_k") is not None or (get("return_documents") is not None and not is_infinity):
        return EITHER
    return COHERE


def in_order_given(answer: Answer, scores: Iterable[float], nothing: float) -> list[float]:
    """Return a score for every candidate, in the order they were sent."""
    each = [nothing] * answer.num_asked
    for position, score in zip(answer.order.tolist(), scores, strict=True):
        each[position] = score
    return each


def warnings_of(answer: Answer) -> list[str]:
    """Return what the client should know of an answer that it got all the same."""
    warnings = []
    if answer.truncated:
        warnings.append(f"the query was cut to {answer.num_wordpieces} wordpieces")
    if answer.missing:
        names = ", ".join(repr(fault.id[:80]) for fault in answer.missing[:5])
        rest = len(answer.missing) - 5
        more = f" and {rest} more" if rest > 0 else ""
        absent = counted(len(answer.missing), "id is", "ids are")
        warnings.append(f"{absent} not in the store: {names}{more}")
    if answer.unreached:
        shards = ", ".join(sorted({fault.reason for fault in answer.unreached}))
        unranked = counted(len(answer.unreached), "id is", "ids are")
        warnings.append(f"{unranked} not ranked: {shards}")
    if answer.errors:
        unscored = counted(len(answer.errors), "id has", "ids have")
        warnings.append(f"{unscored} no score: see errors")
    return warnings


def errors_of(answer: Answer) -> list[dict[str, Any]]:
    """Return the candidates whose record gave no score."""
    return [
        {"index": fault.index, "id": fault.id, "message": "its stored record is damaged"}
        for fault in answer.errors
    ]


def new_id() -> str:
    """Return an id that no other answer has."""
    return f"rr-{_run}-{next(_number):x}"
