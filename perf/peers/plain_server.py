"""The server that one writes in an afternoon: FastAPI, pydantic models, `rank` in a thread pool.

Run in place of `edje serve`, with its words; `--free` takes an engine and reads that cost nothing.
Requests share no batches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ...runtime.reranker import Reranker
from ..serve_free import nothing_but_the_front


def main(words: Sequence[str]) -> int:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--admin-port", type=int)
    parser.add_argument("--free", action="store_true")
    given = parser.parse_args(words)
    import uvicorn

    with (
        nothing_but_the_front() if given.free else nullcontext(),
        Reranker.open(given.engine, store=given.store) as reranker,
    ):
        reranker.warm_up()
        uvicorn.run(application(reranker), port=given.port, log_level="warning")
    return 0


def application(reranker: Reranker) -> Any:
    """Return the application, as FastAPI's tutorial writes one."""
    import fastapi
    import pydantic

    class Asked(pydantic.BaseModel):
        query: str
        documents: list[str]
        top_n: int | None = None
        raw_scores: bool = False

    class Result(pydantic.BaseModel):
        index: int
        relevance_score: float

    class Answer(pydantic.BaseModel):
        results: list[Result]

    app = fastapi.FastAPI()

    def rerank(asked: Asked) -> Answer:
        ranked = reranker.rank(asked.query, asked.documents, asked.top_n)
        return Answer(
            results=[Result(index=hit.index, relevance_score=hit.score) for hit in ranked]
        )

    # Annotations are text in this module, and these classes are local to the function.
    rerank.__annotations__ = {"asked": Asked, "return": Answer}
    app.post("/v2/rerank")(rerank)
    app.get("/readyz")(lambda: {"status": "ready"})
    return app


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
