"""LlamaIndex's postprocessors: cohere, TEI, NVIDIA, Voyage. They put metadata before the id."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cohere
import httpx
import pytest
import voyageai
from cases import UNKNOWN, Case
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.postprocessor.nvidia_rerank import NVIDIARerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from llama_index.postprocessor.voyageai_rerank import VoyageAIRerank

from busy_server import until_raised

Make = Callable[..., Any]
# LlamaIndex's TEI reranker looks at no status: it fails where it takes the error for a list.
NO_LIST = (AssertionError, TypeError)


def of_cohere(url: str, key: str = "none", top_n: int = 16) -> CohereRerank:
    return CohereRerank(model="edje", api_key=key, base_url=url, top_n=top_n)


def of_tei(url: str, key: str = "none", top_n: int = 16) -> TextEmbeddingInference:
    return TextEmbeddingInference(base_url=url, auth_token=key, top_n=top_n)


def of_nvidia(url: str, key: str = "none", top_n: int = 16) -> NVIDIARerank:
    return NVIDIARerank("edje", api_key=key, base_url=f"{url}/v1", top_n=top_n)


def of_voyage(url: str, key: str = "none", top_n: int = 16) -> VoyageAIRerank:
    """It has no word for a base URL, so the client that it makes gets one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voyageai, "Client", partial(voyageai.Client, base_url=f"{url}/v1"))
        return VoyageAIRerank("edje", api_key=key, top_n=top_n)


def nodes(ids: list[str]) -> list[NodeWithScore]:
    texts = [TextNode(text=name, metadata={"page": i}) for i, name in enumerate(ids)]
    return [NodeWithScore(node=node, score=0.5) for node in texts]


def ask(reranker: Any, ids: list[str], query: str) -> list[tuple[str, float]]:
    ranked = reranker.postprocess_nodes(nodes(ids), QueryBundle(query))
    return [(one.node.text, one.score) for one in ranked]


@pytest.mark.parametrize("make", [of_cohere, of_tei, of_nvidia, of_voyage])
def test_order_and_scores(make: Make, url: str, case: Case) -> None:
    ranked = ask(make(url), case.ids, case.query)
    assert [name for name, _ in ranked] == case.ranked
    expected = case.logits if make is of_nvidia else case.scores
    assert [score for _, score in ranked] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    first = ask(make(url, top_n=3), case.ids, case.query)
    assert [name for name, _ in first] == case.ranked[:3]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (of_cohere, cohere.UnprocessableEntityError),
        (of_tei, NO_LIST),
        (of_nvidia, httpx.HTTPStatusError),
        (of_voyage, voyageai.error.MalformedRequestError),
    ],
)
def test_an_unknown_id(make: Make, kind, url: str, one_case: Case) -> None:
    with pytest.raises(kind):
        ask(make(url), [UNKNOWN], one_case.query)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (of_cohere, cohere.UnauthorizedError),
        (of_tei, NO_LIST),
        (of_nvidia, httpx.HTTPStatusError),
        (of_voyage, voyageai.error.AuthenticationError),
    ],
)
def test_a_wrong_key(make: Make, kind, locked: str, one_case: Case) -> None:
    with pytest.raises(kind):
        ask(make(locked, "wrong"), one_case.ids, one_case.query)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (of_cohere, cohere.TooManyRequestsError),
        (of_tei, NO_LIST),
        (of_nvidia, httpx.HTTPStatusError),
        (of_voyage, voyageai.error.RateLimitError),
    ],
)
def test_overload(make: Make, kind, overloaded: str, one_case: Case) -> None:
    reranker = make(overloaded)
    refused = until_raised(lambda: ask(reranker, one_case.ids, one_case.query), kind)
    assert isinstance(refused, kind)
