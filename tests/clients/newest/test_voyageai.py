"""Voyage's own SDK."""

from __future__ import annotations

import pytest
import voyageai
from cases import KEY, UNKNOWN, Case
from voyageai import error

from busy_server import until_raised


def client(url: str, key: str = "none") -> voyageai.Client:
    return voyageai.Client(api_key=key, base_url=f"{url}/v1")


def test_order_and_scores(url: str, case: Case) -> None:
    answer = client(url).rerank(case.query, case.ids, "edje")
    assert [one.index for one in answer.results] == case.order
    assert [one.document for one in answer.results] == case.ranked
    assert [one.relevance_score for one in answer.results] == pytest.approx(case.scores, rel=1e-3)
    assert answer.total_tokens > 0
    first = client(url).rerank(case.query, case.ids, "edje", top_k=3)
    assert [one.index for one in first.results] == case.order[:3]


def test_errors(url: str, locked: str, overloaded: str, one_case: Case) -> None:
    with pytest.raises(error.MalformedRequestError, match=UNKNOWN):
        client(url).rerank(one_case.query, [UNKNOWN], "edje")
    with pytest.raises(error.AuthenticationError, match="the API key is not known"):
        client(locked, "wrong").rerank(one_case.query, one_case.ids, "edje")
    assert client(locked, KEY).rerank(one_case.query, one_case.ids, "edje").results
    late = client(overloaded)
    until_raised(lambda: late.rerank(one_case.query, one_case.ids, "edje"), error.RateLimitError)
