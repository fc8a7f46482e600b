"""Bodies as servers and tools send them that cannot be installed here, read as those read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje import Reranker
from edje.runtime.results import Hit
from edje.runtime.server import ServiceOptions
from running_server import Running, running, settings_of

QUERY = "a dog on a beach"
IDS = [f"img-{i}" for i in (4, 10, 1, 8, 6)]
ASKS = {"query": QUERY, "documents": IDS}
Scores = dict[int, float]


def of_results(answer: Any) -> Scores:
    return {one["index"]: one["relevance_score"] for one in answer["results"]}


def of_data(answer: Any) -> Scores:
    return {one["index"]: one["relevance_score"] for one in answer["data"]}


def of_array(answer: Any) -> Scores:
    return {one["index"]: one["score"] for one in answer}


def of_score(answer: Any) -> Scores:
    return {one["index"]: one["score"] for one in answer["data"]}


def by_position(answer: Any) -> Scores:
    """Weaviate takes the first score for the first document, and so on."""
    return dict(enumerate(one["score"] for one in answer["scores"]))


@dataclass(frozen=True)
class Recorded:
    """What one tool sends, and how it reads the answer."""

    tool: str
    body: dict[str, Any]
    read: Callable[[Any], Scores] = of_results
    path: str = "/v1/rerank"
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.tool


RECORDED = [
    Recorded(
        "open-webui",
        {"model": "m", **ASKS, "top_n": len(IDS)},
        headers={"X-OpenWebUI-User-Name": "a", "Authorization": "Bearer any"},
    ),
    Recorded(
        "Dify",
        {"model": "m", **ASKS, "top_n": None, "return_documents": True},
        path="/rerank",
    ),
    Recorded("RAGFlow", {"model": "m", **ASKS, "top_n": len(IDS)}),
    Recorded(
        "RAGFlow for Xinference",
        {"model": "m", **ASKS, "return_documents": "true", "return_len": "true"},
    ),
    Recorded("Milvus, vLLM", ASKS, path="/rerank"),
    Recorded("Milvus, vLLM, cut", {**ASKS, "truncate_prompt_tokens": 256}, path="/rerank"),
    Recorded(
        "Milvus, TEI",
        {"query": QUERY, "texts": IDS, "truncate": True, "truncation_direction": "Left"},
        of_array,
        "/rerank",
    ),
    Recorded("Weaviate", {**ASKS, "property": ""}, by_position, "/rerank"),
    Recorded("Elasticsearch", {"model": "m", **ASKS, "top_n": len(IDS)}),
    Recorded("vllm bench", {"model": "m", **ASKS, "truncate_prompt_tokens": -1}),
    Recorded(
        "vLLM's score",
        {"model": "m", "text_1": QUERY, "text_2": IDS, "truncate_prompt_tokens": -1},
        of_score,
        "/score",
    ),
    Recorded("LightRAG", {"model": "m", **ASKS, "top_n": 5, "return_documents": False}),
    Recorded("LightRAG of old", {"model": "m", **ASKS, "top_k": 5}),
    Recorded("LiteLLM's voyage", {"model": "m", **ASKS, "return_documents": True}, of_data),
    Recorded(
        "Jina, nulls",
        {"model": "m", **ASKS}
        | dict.fromkeys(["top_n", "return_documents", "max_doc_length", "truncation"]),
    ),
    Recorded(
        "LangChain's cohere",
        {"model": "m", **ASKS, "top_n": 5, "max_tokens_per_doc": None},
        path="/v2/rerank",
    ),
    Recorded(
        "content parts",
        {
            "query": QUERY,
            "documents": [
                {"content": [{"type": "image_url", "image_url": {"url": f"edje://{name}"}}]}
                for name in IDS
            ],
        },
    ),
]


@pytest.fixture(scope="module")
def expected(tiny_engine: Path, tiny_store: Path) -> tuple[Hit, ...]:
    """The ranking that `Reranker.rank` gives, without any server."""
    with Reranker.open(tiny_engine, store=tiny_store) as reranker:
        return reranker.rank(QUERY, IDS).hits


def probabilities(hits: tuple[Hit, ...]) -> Scores:
    return {hit.index: 1 / (1 + np.exp(-hit.score)) for hit in hits}


@pytest.mark.parametrize("recorded", RECORDED, ids=str)
def test_each_tool_finds_every_score(recorded: Recorded, server: Running, expected):
    answer = server.ask(recorded.path, recorded.body, headers=recorded.headers)
    assert answer.status == 200, answer.body
    assert recorded.read(answer.json()) == pytest.approx(probabilities(expected), rel=1e-4)


@pytest.mark.parametrize("recorded", RECORDED, ids=str)
def test_every_answer_but_those_in_the_order_sent_is_best_first(recorded, server, expected):
    answer = server.ask(recorded.path, recorded.body, headers=recorded.headers).json()
    if recorded.read in (by_position, of_score):
        assert list(recorded.read(answer)) == list(range(len(IDS)))
    else:
        assert list(recorded.read(answer)) == [hit.index for hit in expected]


def test_elasticsearch_s_paths_lead_to_scores_and_indexes(server: Running, expected):
    """`$.results[*].relevance_score` and `$.results[*].index`, of the same length."""
    results = server.ask("/v1/rerank", ASKS).json()["results"]
    assert [one["index"] for one in results] == [hit.index for hit in expected]
    assert all(isinstance(one["relevance_score"], float) for one in results)


def test_what_tools_bill_and_measure_by_is_a_positive_number(server: Running):
    answer = server.ask("/v1/rerank", {"model": "m", **ASKS}).json()
    usage, tokens = answer["usage"], answer["meta"]["tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] > 2
    assert tokens["input_tokens"] + tokens["output_tokens"] == usage["total_tokens"]


def test_a_model_s_name_is_told_back_and_none_is_needed(server: Running):
    named = server.ask("/rerank", {"model": "BAAI/bge-reranker", **ASKS}).json()
    assert named["model"] == "BAAI/bge-reranker"
    assert server.ask("/rerank", ASKS).json()["model"] == "edje"


@pytest.fixture(scope="module")
def lenient(tiny_engine: Path, tiny_store: Path) -> Iterator[Running]:
    """A server with `--unknown-ids lowest`."""
    options = ServiceOptions(unknown="lowest")
    with running(settings_of(tiny_engine, tiny_store, service=options)) as started:
        yield started


def test_dify_may_test_the_server_with_sentences(lenient: Running):
    """It does so before it takes a server on; it divides by nothing where all scores are equal."""
    sentences = ["Vienna lies on the Danube.", "Rome lies on the Tiber.", "Cairo is in Egypt."]
    body = {"model": "m", "query": "Which town lies in Africa?", "documents": sentences}
    answer = lenient.ask("/rerank", {**body, "top_n": 3, "return_documents": True})
    assert answer.status == 200
    results = answer.json()["results"]
    assert [(one["index"], one["relevance_score"]) for one in results] == [(0, 0), (1, 0), (2, 0)]
    assert [one["document"]["text"] for one in results] == sentences
    assert answer.headers["x-edje-missing"].startswith("3;")


def test_ids_ahead_of_the_store_rank_last_and_every_index_comes_back(lenient: Running, expected):
    documents = ["not-yet", *IDS]
    answer = lenient.ask("/v1/rerank", {"query": QUERY, "documents": documents, "top_n": 6})
    results = answer.json()["results"]
    assert [one["index"] for one in results] == [*(hit.index + 1 for hit in expected), 0]
    assert results[-1]["relevance_score"] == 0


@pytest.fixture(scope="module")
def patterned(tiny_engine: Path, tiny_store: Path) -> Iterator[Running]:
    """A server with `--id-pattern`."""
    with running(settings_of(tiny_engine, tiny_store, id_pattern=r"img-\d+")) as started:
        yield started


def test_llama_index_s_metadata_may_stand_before_the_id(patterned: Running, expected):
    documents = [f"page: {i}\nkind: photo\n\n{name}" for i, name in enumerate(IDS)]
    body = {"model": "m", "query": QUERY, "documents": documents, "top_n": 5}
    answer = patterned.ask("/v2/rerank", body).json()
    assert of_results(answer) == pytest.approx(probabilities(expected), rel=1e-4)


def test_langchain_s_yaml_of_a_dict_holds_the_id(patterned: Running, expected):
    documents = [f"id: {name}\ntitle: a photo\n" for name in IDS]
    body = {"model": "m", "query": QUERY, "documents": documents, "max_tokens_per_doc": None}
    answer = patterned.ask("/v2/rerank", {**body, "top_n": 5}).json()
    assert [one["index"] for one in answer["results"]] == [hit.index for hit in expected]


def test_aiperf_s_nvidia_rankings(server: Running, expected):
    passages = [{"text": name} for name in IDS]
    body = {"model": "m", "query": {"text": QUERY}, "passages": passages, "truncate": "END"}
    rankings = server.ask("/v1/ranking", body).json()["rankings"]
    assert [one["index"] for one in rankings] == [hit.index for hit in expected]
    raw = [hit.score for hit in expected]
    assert [one["logit"] for one in rankings] == pytest.approx(raw, rel=1e-5)
