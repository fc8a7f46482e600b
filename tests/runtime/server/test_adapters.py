"""The adapters, each inside the library that it is made for; without the library it skips."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp
from pathlib import Path
from typing import Any

import pytest

from edje import Reranker

QUERY = "a photo of a cat"
IDS = [f"img-{number}" for number in range(12)]


@pytest.fixture(scope="module")
def reranker(tiny_engine: Path, tiny_store: Path) -> Iterator[Reranker]:
    with Reranker.open(tiny_engine, store=tiny_store, num_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(reranker: Reranker) -> list[tuple[str, float]]:
    """Ids and sigmoids, best first, of all images."""
    return [(hit.id, 1 / (1 + exp(-hit.score))) for hit in reranker.rank(QUERY, IDS).hits]


def ids_of(pairs: list[tuple[str, float]]) -> list[str]:
    return [each for each, _ in pairs]


@pytest.fixture
def table(tmp_path: Path) -> Any:
    lancedb = pytest.importorskip("lancedb")
    rows = [
        {"id": each, "vector": [float(number), 1.0], "caption": f"a cat number {number}"}
        for number, each in enumerate([*IDS, "not-in-the-store"])
    ]
    return lancedb.connect(tmp_path).create_table("photos", rows)


def test_lancedb_orders_a_vector_search(
    table: Any, reranker: Reranker, expected: list[tuple[str, float]]
) -> None:
    from edje.runtime.server.adapters.lancedb import EdjeReranker

    found = table.search([0.0, 1.0]).limit(20).rerank(EdjeReranker(reranker), QUERY).to_arrow()
    assert found["id"].to_pylist() == [*ids_of(expected), "not-in-the-store"]
    scores = found["_relevance_score"].to_pylist()
    assert scores[:-1] == pytest.approx([score for _, score in expected], rel=1e-5)
    assert scores[-1] == 0.0
    assert "_distance" not in found.column_names


def test_lancedb_orders_a_hybrid_search_and_keeps_its_scores(
    table: Any, reranker: Reranker, expected: list[tuple[str, float]]
) -> None:
    from lancedb.index import FTS

    from edje.runtime.server.adapters.lancedb import EdjeReranker

    table.create_index("caption", config=FTS())
    for kept in ("relevance", "all"):
        asked = table.search(query_type="hybrid").vector([0.0, 1.0]).text(QUERY).limit(20)
        found = asked.rerank(EdjeReranker(reranker, "id", kept)).to_arrow()
        assert found["id"].to_pylist()[:12] == ids_of(expected)
        assert ("_distance" in found.column_names) == (kept == "all")
    asked = table.search(QUERY, query_type="fts").limit(20).rerank(EdjeReranker(reranker))
    assert asked.to_arrow()["id"].to_pylist()[:12] == ids_of(expected)


def test_lancedb_finds_nothing(table: Any, reranker: Reranker) -> None:
    from edje.runtime.server.adapters.lancedb import EdjeReranker

    asked = table.search([0.0, 1.0]).where("id = 'none'")
    found = asked.rerank(EdjeReranker(reranker), QUERY).to_arrow()
    assert len(found) == 0
    assert "_relevance_score" in found.column_names


def test_haystack_ranks_within_a_saved_pipeline(
    tiny_engine: Path, tiny_store: Path, expected: list[tuple[str, float]]
) -> None:
    haystack = pytest.importorskip("haystack")
    from edje.runtime.server.adapters.haystack import EdjeRanker

    made = haystack.Pipeline()
    made.add_component("ranker", EdjeRanker(str(tiny_engine), str(tiny_store), 3, "image"))
    pipeline = (
        haystack.Pipeline.loads(made.dumps(), allowed_modules=["edje.*"])
        if _guards(haystack)
        else haystack.Pipeline.loads(made.dumps())
    )
    documents = [
        haystack.Document(content="x", meta={"image": each, "n": at})
        for at, each in enumerate(["nowhere", *IDS])
    ]
    asked = {"ranker": {"query": QUERY, "documents": documents}}
    ranked = pipeline.run(asked)["ranker"]["documents"]
    assert [each.meta["image"] for each in ranked] == ids_of(expected)[:3]
    assert [each.score for each in ranked] == pytest.approx([s for _, s in expected[:3]], rel=1e-5)
    assert all(each.score is None for each in documents), "the given ones stay as they are"
    asked["ranker"]["top_k"] = 5
    assert len(pipeline.run(asked)["ranker"]["documents"]) == 5
    asked["ranker"]["documents"] = []
    assert pipeline.run(asked)["ranker"]["documents"] == []


def _guards(haystack: Any) -> bool:
    """Whether this Haystack loads only what it is told to trust."""
    from inspect import signature

    return "allowed_modules" in signature(haystack.Pipeline.loads).parameters


def test_langchain_compresses(reranker: Reranker, expected: list[tuple[str, float]]) -> None:
    documents_module = pytest.importorskip("langchain_core.documents")
    from edje.runtime.server.adapters.langchain import EdjeCompressor

    documents = [documents_module.Document(page_content=each) for each in ["nowhere", *IDS]]
    found = EdjeCompressor(reranker=reranker, top_n=4).compress_documents(documents, QUERY)
    assert [each.page_content for each in found] == ids_of(expected)[:4]
    scores = [each.metadata["relevance_score"] for each in found]
    assert scores == pytest.approx([score for _, score in expected[:4]], rel=1e-5)
    assert all(each.metadata == {} for each in documents), "the given ones stay as they are"


async def _acompress(compressor: Any, documents: list[Any]) -> Any:
    return await compressor.acompress_documents(documents, QUERY)


def test_langchain_reads_ids_from_metadata(
    reranker: Reranker, expected: list[tuple[str, float]]
) -> None:
    import asyncio

    documents_module = pytest.importorskip("langchain_core.documents")
    from edje.runtime.server.adapters.langchain import EdjeCompressor

    documents = [
        documents_module.Document(page_content="text", metadata={"image": each}) for each in IDS
    ]
    compressor = EdjeCompressor(reranker=reranker, top_n=None, metadata_field="image")
    found = asyncio.run(_acompress(compressor, documents))
    assert [each.metadata["image"] for each in found] == ids_of(expected)
    assert compressor.compress_documents([], QUERY) == []
    with pytest.raises(ValueError, match="top"):
        EdjeCompressor(reranker=reranker, top=3)
