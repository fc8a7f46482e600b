"""What a server that is measured must answer: the scores of every image for some queries."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import numpy as np

from ..arrays import Float32
from ..errors import EdjeError
from ..runtime.reranker import Reranker
from ..runtime.results import Hit
from .harness import scores_in_order
from .server_process import ServerProcess

ENGINE, STORE = "engine", "scenes.store"  # in the folder that `make demo` writes


@dataclass(frozen=True, slots=True)
class Known:
    """What every request must answer: the score of each image for some queries.

    Attributes:
        ids: of the store, in its order.
        scores: raw logits float32 [N] of every query.
    """

    ids: Sequence[str]
    scores: Mapping[str, Float32]

    @classmethod
    def of(cls, engine: Path, store: Path, queries: Sequence[str]) -> Known:
        """Score the whole store for some queries, without a server."""
        with Reranker.open(engine, store=store) as reranker:
            ids = list(reranker.store.ids())
            return cls(ids, {query: scores_in_order(reranker, query) for query in queries})

    def wrong(self, query: str, picked: Sequence[int], found: Float32, tolerance: float) -> bool:
        """Whether scores (float32 [N], in the order of `picked`) are not those of the images."""
        expected = self.scores[query][np.asarray(picked)]
        return found.shape != expected.shape or not np.allclose(found, expected, atol=tolerance)


def read_queries(demo: Path, number: int) -> list[str]:
    """Return the first queries of the demo."""
    with (demo / "queries.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["query"] for line, _ in zip(lines, range(number), strict=False)]


def asking(
    stack: ExitStack, server: ServerProcess, query: str, ids: Sequence[str], top_k: int
) -> Callable[[], list[Hit]]:
    """Return what asks for one ranking, over a connection that stays open until `stack` ends.

    Its scores are raw logits. It raises EdjeError where the server answers anything but 200.
    """
    connection = HTTPConnection("127.0.0.1", server.port, timeout=600)
    stack.callback(connection.close)
    asked = {"query": query, "documents": list(ids), "top_n": top_k, "raw_scores": True}
    body, headers = json.dumps(asked), {"content-type": "application/json"}

    def ask() -> list[Hit]:
        connection.request("POST", "/v2/rerank", body, headers)
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise EdjeError(f"the server answered {response.status}: {content[:300]!r}")
        rows = json.loads(content)["results"]
        return [Hit(ids[row["index"]], row["relevance_score"], row["index"]) for row in rows]

    return ask
