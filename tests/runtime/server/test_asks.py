"""Bodies are read in every form clients send, and all that is wrong is told at once."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.runtime.server.asks import Ask, Fields, read_body
from edje.runtime.server.refusals import Refusal

PREFIXED = re.compile(r"img-\d+")


def documents(value, pattern=None) -> Ask:
    fields = Fields({}, pattern)
    fields.documents(value, "documents")
    return fields.ask


@pytest.mark.parametrize(
    "form",
    [
        "img-7",
        "edje://img-7",
        {"id": "img-7"},
        {"text": "img-7"},
        {"image": "edje://img-7"},
        {"url": "edje://img-7"},
        {"image_url": {"url": "edje://img-7"}},
        {"image_url": "edje://img-7"},
        {"content": [{"type": "image_url", "image_url": {"url": "edje://img-7"}}]},
        {"content": [{"type": "text", "text": "img-7"}]},
        {"content": "img-7"},
        {"document": {"text": "img-7"}},
        {"id": None, "text": "img-7", "title": "of the page"},
    ],
)
def test_an_id_in_every_form_that_clients_send(form):
    ask = documents([form, "other"])
    assert ask.ids == ["img-7", "other"]
    assert ask.faults == []


def test_one_document_needs_no_list():
    assert documents("img-1").ids == ["img-1"]
    assert documents({"id": "img-1"}).ids == ["img-1"]


def test_an_expression_finds_the_id_behind_metadata():
    ask = documents(["file: a.png\n\nimg-12", "img-3", "none here"], PREFIXED)
    assert ask.ids == ["img-12", "img-3", "none here"]
    assert documents(["k: 1\n\nid=<x y>"], re.compile("id=<(.*)>")).ids == ["x y"]


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (None, "documents: is missing, expected a list of ids"),
        (5, "documents: is 5, expected a list of ids"),
        ([], "documents: is empty, expected one id or more"),
        (["a", 5], "documents.1: is 5, expected an id"),
        ([{}], "documents.0: is an object, expected an id"),
        ([["a"]], "documents.0: is a list, expected an id"),
        ([None], "documents.0: is missing, expected an id"),
    ],
)
def test_documents_that_cannot_be_meant(value, fault):
    with pytest.raises(Refusal) as refused:
        documents(value).check()
    assert refused.value.status == 422
    assert fault in refused.value.message


def test_every_fault_of_a_body_is_named_at_once():
    fields = Fields({"top_n": -1, "raw_scores": "yes", "model": 7})
    fields.query(None, "query")
    fields.documents([1, 2], "documents")
    fields.count("top_n", "top_k")
    fields.flag("raw_scores")
    fields.text("model")
    with pytest.raises(Refusal) as refused:
        fields.ask.check()
    assert [fault.where for fault in refused.value.faults] == [
        ("query",),
        ("documents", 0),
        ("documents", 1),
        ("top_n",),
        ("raw_scores",),
        ("model",),
    ]
    assert refused.value.message.endswith("and 3 more")


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({}, None),
        ({"top_n": None}, None),
        ({"top_n": 0}, None),
        ({"top_n": 3}, 3),
        ({"top_n": 3.0}, 3),
        ({"top_k": 4}, 4),
        ({"top_n": None, "top_k": 4}, 4),
        ({"top_n": 2, "top_k": 4}, 2),
    ],
)
def test_how_many_are_wanted(body, wanted):
    assert Fields(body).count("top_n", "top_k") == wanted


@pytest.mark.parametrize("value", [True, 1.5, "3", [3]])
def test_a_count_that_is_no_whole_number_is_refused(value):
    fields = Fields({"top_n": value})
    fields.count("top_n")
    assert fields.ask.faults


@pytest.mark.parametrize(
    ("raw", "status"),
    [(b"", 400), (b"  ", 400), (b"{", 400), (b"\xff{}", 400), (b"[]", 422), (b"5", 422)],
)
def test_what_is_no_json_object(raw, status):
    with pytest.raises(Refusal) as refused:
        read_body(raw)
    assert refused.value.status == status


def test_nesting_without_end_is_refused_and_not_a_crash():
    with pytest.raises(Refusal):
        read_body(b'{"query":' + b"[" * 200_000)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(value=JSON)
def test_any_json_gives_ids_or_a_fault(value):
    fields = Fields({"top_n": value, "raw_scores": value, "model": value})
    fields.query(value, "query")
    fields.documents(value, "documents")
    fields.count("top_n")
    fields.flag("raw_scores")
    fields.text("model")
    assert all(isinstance(name, str) for name in fields.ask.ids)
    json.dumps([fault.message for fault in fields.ask.faults])


@given(raw=st.binary(max_size=200))
def test_any_bytes_are_an_object_or_refused(raw):
    refused = None
    try:
        assert isinstance(read_body(raw), dict)
    except Refusal as refusal:
        refused = refusal
    if refused is not None:
        assert refused.status in (400, 422)
        json.dumps(refused.body())
