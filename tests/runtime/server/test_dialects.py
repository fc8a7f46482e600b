"""Each dialect writes what its clients read: shapes, order, the scale of scores."""

from __future__ import annotations

import json
from math import exp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.runtime.results import EngineLabel, Fault
from edje.runtime.server import Answer, Stages
from edje.runtime.server import dialects as d

IDS = ["img-0", "img-1", "img-2", "img-3"]


def answer(order=(2, 0, 1), logits=(3.0, 0.5, -2.0), **changed) -> Answer:
    given = {
        "ids": IDS,
        "order": np.array(order, np.int64),
        "logits": np.array(logits, np.float32),
        "errors": (Fault("img-3", "its stored record is damaged: /a/path", 3),),
        "missing": (),
        "truncated": False,
        "num_wordpieces": 7,
        "stages": Stages(),
        "engine": EngineLabel("toy", "fp32", "host"),
        "rescoring": None,
        "num_asked": 4,
        **changed,
    }
    return Answer(**given)


def ask(dialect: d.Dialect, body: dict, **changed):
    read = dialect.read(body, None)
    read.check()
    return json.loads(dialect.write(read, answer(**changed), "edje"))


def sigmoid(logit: float) -> float:
    return 1 / (1 + exp(-logit))


def test_cohere_jina_vllm_and_infinity_read_one_body():
    got = ask(d.COHERE, {"query": "q", "documents": IDS, "model": "rerank-v3.5"})
    assert [result["index"] for result in got["results"]] == [2, 0, 1]
    scores = [result["relevance_score"] for result in got["results"]]
    assert scores == pytest.approx([sigmoid(3), sigmoid(0.5), sigmoid(-2)])
    assert "document" not in got["results"][0]
    assert got["object"] == "rerank"
    assert got["model"] == "rerank-v3.5"
    assert got["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert got["meta"]["billed_units"] == {"search_units": 1}
    assert got["score_type"] == "sigmoid"
    assert got["errors"] == [
        {"index": 3, "id": "img-3", "message": "its stored record is damaged"}
    ], "an answer names no path"
    assert got["meta"]["warnings"] == ["1 id has no score: see errors"]


def test_logits_and_documents_on_request():
    body = {"query": "q", "documents": IDS, "raw_scores": True, "return_documents": True}
    got = ask(d.COHERE, body)
    assert got["results"][0] == {
        "index": 2,
        "relevance_score": 3.0,
        "document": {"text": "img-2"},
    }
    assert got["score_type"] == "logit"


def test_vllms_use_activation_false_is_raw_scores():
    body = {"query": "q", "documents": IDS, "use_activation": False}
    assert ask(d.COHERE, body)["score_type"] == "logit"


def test_null_stands_for_every_optional_field():
    optional = ("top_n", "top_k", "model", "raw_scores", "return_documents", "use_activation")
    body = {"query": "q", "documents": IDS, **dict.fromkeys(optional), "max_tokens_per_doc": None}
    assert ask(d.COHERE, body) | {"id": 0, "created": 0} == ask(
        d.COHERE, {"query": "q", "documents": IDS}
    ) | {"id": 0, "created": 0}


def test_voyage_reads_data():
    got = ask(d.VOYAGE, {"query": "q", "documents": IDS, "top_k": 3, "truncation": True})
    assert [result["index"] for result in got["data"]] == [2, 0, 1]
    assert "results" not in got
    assert got["usage"]["total_tokens"] == 7


def test_who_does_not_say_whether_he_reads_results_or_data_finds_both():
    """LiteLLM's voyage leaves `truncation` out; older LightRAG says `top_k` for `top_n`."""
    got = ask(d.EITHER, {"query": "q", "documents": IDS, "return_documents": True, "top_k": 3})
    assert [result["index"] for result in got["results"]] == [2, 0, 1]
    assert got["results"][0]["document"] == {"text": "img-2"}
    assert got["data"] == got["results"]


def test_tei_reads_a_bare_array():
    got = ask(d.TEI, {"query": "q", "texts": IDS, "return_text": True, "raw_scores": True})
    assert got == [
        {"index": 2, "score": 3.0, "text": "img-2"},
        {"index": 0, "score": 0.5, "text": "img-0"},
        {"index": 1, "score": -2.0, "text": "img-1"},
    ]


def test_weaviate_reads_the_order_it_sent():
    got = ask(d.WEAVIATE, {"query": "q", "documents": IDS, "property": ""})
    assert got["query"] == "q"
    assert [one["document"] for one in got["scores"]] == IDS
    assert [one["score"] for one in got["scores"]] == pytest.approx(
        [sigmoid(0.5), sigmoid(-2), sigmoid(3), 0.0]
    )


def test_nvidia_reads_raw_logits():
    passages = [{"text": name} for name in IDS]
    got = ask(d.NVIDIA, {"query": {"text": "q"}, "passages": passages, "truncate": "END"})
    assert got["rankings"] == [
        {"index": 2, "logit": 3.0},
        {"index": 0, "logit": 0.5},
        {"index": 1, "logit": -2.0},
    ]


@pytest.mark.parametrize(
    "body",
    [
        {"text_1": "q", "text_2": IDS},
        {"queries": ["q"], "documents": IDS},
        {"queries": "q", "items": IDS},
        {"data_1": "q", "data_2": IDS},
    ],
)
def test_vllms_score_is_in_the_order_sent(body):
    got = ask(d.SCORE, body)
    assert [one["index"] for one in got["data"]] == [0, 1, 2, 3]
    assert [one["score"] for one in got["data"]] == pytest.approx(
        [sigmoid(0.5), sigmoid(-2), sigmoid(3), 0.0]
    )


def test_score_takes_one_query():
    read = d.SCORE.read({"queries": ["a", "b"], "documents": ["c", "d"]}, None)
    assert "send a request for each" in read.faults[0].message


@pytest.mark.parametrize(
    ("body", "dialect"),
    [
        ({"documents": []}, d.COHERE),
        ({"documents": [], "top_n": 3}, d.COHERE),
        ({"documents": [], "top_n": 3, "top_k": 3}, d.COHERE),
        ({"documents": [], "top_k": 3}, d.EITHER),
        ({"documents": [], "top_k": 3, "top_n": None}, d.EITHER),
        ({"documents": [], "return_documents": True}, d.EITHER),
        ({"documents": [], "return_documents": True, "top_n": 3}, d.COHERE),
        ({"documents": [], "return_documents": False, "raw_scores": False}, d.COHERE),
        ({"documents": [], "truncation": True}, d.VOYAGE),
        ({"documents": [], "truncation": None, "texts": None, "property": None}, d.COHERE),
        ({"texts": []}, d.TEI),
        ({"documents": [], "property": ""}, d.WEAVIATE),
    ],
)
def test_the_fields_of_a_body_tell_its_dialect(body, dialect):
    assert d.rerank_dialect(body) is dialect


def test_ids_that_rank_last_have_score_0_or_the_lowest_logit():
    missing = (Fault("nope", "it is not in the store", 1),)
    changed = {"order": (0, 1), "logits": (1.0, -np.inf), "errors": (), "missing": missing}
    got = ask(d.COHERE, {"query": "q", "documents": IDS}, **changed)
    assert got["results"][1] == {"index": 1, "relevance_score": 0.0}
    assert got["meta"]["warnings"] == ["1 id is not in the store: 'nope'"]
    raw = ask(d.COHERE, {"query": "q", "documents": IDS, "raw_scores": True}, **changed)
    assert raw["results"][1]["relevance_score"] == d.LOWEST_LOGIT


def test_a_cut_query_is_a_warning():
    got = ask(d.COHERE, {"query": "q", "documents": IDS}, truncated=True, errors=())
    assert got["meta"]["warnings"] == ["the query was cut to 7 wordpieces"]


@given(st.lists(st.floats(-3e4, 3e4, width=32), min_size=1, max_size=20))
def test_scores_lie_in_0_to_1_and_keep_the_order(logits):
    logits = sorted(logits, reverse=True)
    scores = d.sigmoid(np.array(logits, np.float32))
    assert ((scores >= 0) & (scores <= 1)).all()
    assert (np.diff(scores) <= 0).all()


def test_scores_that_half_precision_would_make_equal_stay_apart():
    """float16's sigmoid is 1.0 from 8.3 on; order would be lost (infinity#203 and others)."""
    scores = d.sigmoid(np.array([12.0, 11.5, 11.0], np.float32))
    assert len(set(scores.tolist())) == 3


def test_ids_of_answers_differ():
    assert len({d.new_id() for _ in range(100)}) == 100
