"""Cohere's own SDK, both of its clients."""

from __future__ import annotations

import cohere
import pytest
from cases import KEY, UNKNOWN, Case
from cohere.core.request_options import RequestOptions

from busy_server import until_raised

CLIENTS = [cohere.Client, cohere.ClientV2]


@pytest.mark.parametrize("client", CLIENTS)
def test_order_and_scores(client, url: str, case: Case) -> None:
    asked = client(api_key="none", base_url=url)
    answer = asked.rerank(model="edje", query=case.query, documents=case.ids)
    assert [one.index for one in answer.results] == case.order
    assert [one.relevance_score for one in answer.results] == pytest.approx(case.scores, rel=1e-3)
    first = asked.rerank(model="edje", query=case.query, documents=case.ids, top_n=3)
    assert [one.index for one in first.results] == case.order[:3]


@pytest.mark.parametrize("client", CLIENTS)
def test_errors(client, url: str, locked: str, overloaded: str, one_case: Case) -> None:
    ask = {"model": "edje", "query": one_case.query, "documents": [UNKNOWN]}
    with pytest.raises(cohere.UnprocessableEntityError, match=UNKNOWN):
        client(api_key="none", base_url=url).rerank(**ask)
    with pytest.raises(cohere.UnauthorizedError, match="the API key is not known"):
        client(api_key="wrong", base_url=locked).rerank(**ask)
    ask["documents"] = one_case.ids
    assert client(api_key=KEY, base_url=locked).rerank(**ask).results
    late = client(api_key="none", base_url=overloaded)
    once = RequestOptions(max_retries=0)
    refused = until_raised(
        lambda: late.rerank(**ask, request_options=once), cohere.TooManyRequestsError
    )
    assert int(refused.headers["retry-after"]) >= 1
