"""LangChain's compressors: cohere, NVIDIA, Infinity; and Infinity's own client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cohere
import pytest
from cases import KEY, UNKNOWN, Case
from infinity_client import Client
from infinity_client.api.default import rerank
from infinity_client.errors import UnexpectedStatus
from infinity_client.models import HTTPValidationError, RerankInput, ReRankResult
from langchain_cohere import CohereRerank
from langchain_community.document_compressors.infinity_rerank import InfinityRerank
from langchain_core.documents import Document
from langchain_nvidia_ai_endpoints import NVIDIARerank

from busy_server import until_raised

Make = Callable[..., Any]


def of_cohere(url: str, key: str = "none", top_n: int = 16) -> CohereRerank:
    return CohereRerank(model="edje", cohere_api_key=key, base_url=url, top_n=top_n)


def of_nvidia(url: str, key: str = "none", top_n: int = 16) -> NVIDIARerank:
    return NVIDIARerank(
        model="edje",
        api_key=key,
        base_url=f"{url}/v1",
        top_n=top_n,
        usage_telemetry_enabled=False,
    )


def of_infinity(url: str, key: str = "none", top_n: int = 16) -> InfinityRerank:
    """It takes no `AuthenticatedClient`, so the key is a header."""
    headers = {"Authorization": f"Bearer {key}"}
    client = Client(base_url=url, headers=headers, raise_on_unexpected_status=True)
    return InfinityRerank(client=client, model="edje", top_n=top_n)


def documents(ids: list[str]) -> list[Document]:
    return [Document(name, metadata={"page": 1}) for name in ids]


@pytest.mark.parametrize("make", [of_cohere, of_nvidia, of_infinity])
def test_order_and_scores(make: Make, url: str, case: Case) -> None:
    ranked = make(url).compress_documents(documents(case.ids), case.query)
    assert [document.page_content for document in ranked] == case.ranked
    scores = [document.metadata["relevance_score"] for document in ranked]
    expected = case.logits if make is of_nvidia else case.scores
    assert scores == pytest.approx(expected, rel=1e-3, abs=1e-3)
    first = make(url, top_n=3).compress_documents(documents(case.ids), case.query)
    assert [document.page_content for document in first] == case.ranked[:3]


def test_nvidia_merges_its_batches_by_logit(url: str, case: Case) -> None:
    compressor = of_nvidia(url)
    compressor.max_batch_size = 3
    ranked = compressor.compress_documents(documents(case.ids), case.query)
    assert [document.page_content for document in ranked] == case.ranked


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (of_cohere, cohere.UnprocessableEntityError, UNKNOWN),
        (of_nvidia, Exception, UNKNOWN),
        (of_infinity, KeyError, "0"),  # it takes the list of faults for one of results
    ],
)
def test_an_unknown_id(make: Make, kind, says: str, url: str, one_case: Case) -> None:
    with pytest.raises(kind, match=says):
        make(url).compress_documents(documents([UNKNOWN]), one_case.query)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (of_cohere, cohere.UnauthorizedError),
        (of_nvidia, Exception),
        (of_infinity, UnexpectedStatus),
    ],
)
def test_a_wrong_key(make: Make, kind, locked: str, one_case: Case) -> None:
    with pytest.raises(kind, match="the API key is not known"):
        make(locked, "wrong").compress_documents(documents(one_case.ids), one_case.query)
    right = make(locked, KEY).compress_documents(documents(one_case.ids), one_case.query)
    assert [document.page_content for document in right] == one_case.ranked


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (of_cohere, cohere.TooManyRequestsError),
        (of_nvidia, Exception),
        (of_infinity, UnexpectedStatus),
    ],
)
def test_overload(make: Make, kind, overloaded: str, one_case: Case) -> None:
    compressor = make(overloaded)
    refused = until_raised(
        lambda: compressor.compress_documents(documents(one_case.ids), one_case.query), kind
    )
    assert "too much waits" in str(refused)


def test_infinity_s_own_client(url: str, one_case: Case) -> None:
    client = Client(base_url=url)
    asked = RerankInput(query=one_case.query, documents=one_case.ids, model="edje", top_n=3)
    answer = rerank.sync(client=client, body=asked)
    assert isinstance(answer, ReRankResult)
    assert [one.index for one in answer.results] == one_case.order[:3]
    assert answer.usage.total_tokens > 0
    unknown = RerankInput(query=one_case.query, documents=[UNKNOWN])
    refused = rerank.sync(client=client, body=unknown)
    assert isinstance(refused, HTTPValidationError)
    assert UNKNOWN in refused.detail[0].msg
