"""LiteLLM's rerank providers: cohere, jina_ai, hosted_vllm, huggingface, nvidia_nim, voyage."""

from __future__ import annotations

from typing import Any

import litellm
import pytest
from cases import KEY, UNKNOWN, Case

from busy_server import until_raised

PROVIDERS = ["cohere", "jina_ai", "hosted_vllm", "huggingface", "nvidia_nim", "voyage"]
# LiteLLM has no exception of its own for a 422 from this provider.
UNKNOWN_ID = {"huggingface": litellm.APIError}
litellm.suppress_debug_info = True


def rerank(provider: str, url: str, case: Case, key: str = "none", **more: Any) -> Any:
    asked: dict[str, Any] = {"query": case.query, "documents": case.ids, **more}
    return litellm.rerank(
        model=f"{provider}/edje", api_base=url, api_key=key, max_retries=0, **asked
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_order_and_scores(provider: str, url: str, case: Case) -> None:
    results = rerank(provider, url, case).results
    assert [one["index"] for one in results] == case.order
    expected = case.logits if provider == "nvidia_nim" else case.scores
    assert [one["relevance_score"] for one in results] == pytest.approx(
        expected, rel=1e-3, abs=1e-3
    )
    first = rerank(provider, url, case, top_n=3).results
    assert [one["index"] for one in first] == case.order[:3]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_documents_come_back(provider: str, url: str, one_case: Case) -> None:
    results = rerank(provider, url, one_case, return_documents=True).results
    assert [one["document"]["text"] for one in results] == one_case.ranked


@pytest.mark.parametrize("provider", PROVIDERS)
def test_errors(provider: str, url: str, locked: str, overloaded: str, one_case: Case) -> None:
    with pytest.raises(UNKNOWN_ID.get(provider, litellm.BadRequestError)) as unknown:
        rerank(provider, url, one_case, documents=[UNKNOWN])
    assert UNKNOWN in str(unknown.value)
    with pytest.raises(litellm.AuthenticationError):
        rerank(provider, locked, one_case, "wrong")
    assert rerank(provider, locked, one_case, KEY).results
    until_raised(lambda: rerank(provider, overloaded, one_case), litellm.RateLimitError)
