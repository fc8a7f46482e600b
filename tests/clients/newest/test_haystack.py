"""Haystack's rankers: cohere, jina, vllm, nvidia, Hugging Face's TEI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cohere
import pytest
from cases import KEY, UNKNOWN, Case
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker
from haystack_integrations.components.rankers.jina import JinaRanker
from haystack_integrations.components.rankers.nvidia import NvidiaRanker
from haystack_integrations.components.rankers.vllm import VLLMRanker

from busy_server import until_raised

Make = Callable[..., Any]


def of_cohere(url: str, key: str = "none") -> CohereRanker:
    return CohereRanker(model="edje", api_key=Secret.from_token(key), api_base_url=url, top_k=16)


def of_jina(url: str, key: str = "none") -> JinaRanker:
    return JinaRanker("edje", Secret.from_token(key), base_url=f"{url}/v1/rerank")


def of_vllm(url: str, key: str = "none") -> VLLMRanker:
    api_key = Secret.from_token(key)
    more = {"truncate_prompt_tokens": 256}
    return VLLMRanker(
        model="edje", api_key=api_key, api_base_url=f"{url}/v1", extra_parameters=more
    )


def of_nvidia(url: str, key: str = "none") -> NvidiaRanker:
    api_key = Secret.from_token(key)
    return NvidiaRanker("edje", truncate="END", api_url=f"{url}/v1", api_key=api_key, top_k=16)


def of_tei(url: str, key: str = "none") -> HuggingFaceTEIRanker:
    return HuggingFaceTEIRanker(url=url, token=Secret.from_token(key), top_k=16, max_retries=1)


# Each with what it raises, of a refused request and of a server that has too much to do.
RANKERS = [
    (of_cohere, cohere.UnprocessableEntityError, cohere.UnauthorizedError),
    (of_jina, RuntimeError, RuntimeError),
    (of_vllm, RuntimeError, RuntimeError),
    (of_nvidia, ValueError, ValueError),
    (of_tei, RuntimeError, RuntimeError),
]


def documents(ids: list[str]) -> list[Document]:
    return [Document(content=name) for name in ids]


@pytest.mark.parametrize("make", [of_cohere, of_jina, of_vllm, of_nvidia, of_tei])
def test_order_and_scores(make: Make, url: str, case: Case) -> None:
    ranked = make(url).run(query=case.query, documents=documents(case.ids))["documents"]
    assert [document.content for document in ranked] == case.ranked
    expected = case.logits if make is of_nvidia else case.scores
    assert [document.score for document in ranked] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    first = make(url).run(query=case.query, documents=documents(case.ids), top_k=3)["documents"]
    assert [document.content for document in first] == case.ranked[:3]


@pytest.mark.parametrize(("make", "unknown", "unauthorized"), RANKERS)
def test_errors(make: Make, unknown, unauthorized, url: str, locked: str, one_case: Case) -> None:
    with pytest.raises(unknown, match=UNKNOWN):
        make(url).run(query=one_case.query, documents=documents([UNKNOWN]))
    with pytest.raises(unauthorized, match="the API key is not known"):
        make(locked, "wrong").run(query=one_case.query, documents=documents(one_case.ids))
    right = make(locked, KEY).run(query=one_case.query, documents=documents(one_case.ids))
    assert [document.content for document in right["documents"]] == one_case.ranked


@pytest.mark.parametrize(
    ("make", "says"),
    [(of_jina, "too much waits"), (of_vllm, "too much waits"), (of_nvidia, "too much waits")],
)
def test_overload(make: Make, says: str, overloaded: str, one_case: Case) -> None:
    ranker = make(overloaded)
    asked = {"query": one_case.query, "documents": documents(one_case.ids)}
    refused = until_raised(lambda: ranker.run(**asked), Exception)
    assert says in str(refused)


def test_the_tei_ranker_raises_httpx_s_error_when_its_tries_are_spent(
    overloaded: str, one_case: Case
) -> None:
    ranker = of_tei(overloaded)
    asked = {"query": one_case.query, "documents": documents(one_case.ids)}
    assert "429" in str(until_raised(lambda: ranker.run(**asked), RuntimeError))
