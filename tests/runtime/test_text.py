"""Queries become the ids the official code makes of them, and never special ids."""

from __future__ import annotations

import html
import json
import string

import ftfy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.bundle import TextSpec
from edje.errors import EngineError, RequestError
from edje.runtime.text import QueryTokenizer, canonicalize
from toy_engine import CLS, SEP, toy_tokenizer, toy_tokenizer_json

SPECIAL = ("<image>", "[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]", "<extra>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A t-shirt", "a tshirt"),
        ("the man's  dog_house\t!", "the mans dog house"),
        ("caf\u00c3\u00a9", "caf\u00e9"),
        ("salt &amp;amp; pepper", "salt pepper"),
        ("&lt;image&gt; <image> [SEP]", "image image sep"),
        ("  \u201cquoted\u201d  ", "quoted"),
        ("\uff26\uff35\uff2c\uff2c", "full"),
        ("...", ""),
    ],
)
def test_canonicalisation_is_the_official_one(text, expected):
    assert canonicalize(text) == expected


def official(text: str) -> str:
    """open_clip's `canonicalize_text(basic_clean(text))`."""
    fixed = html.unescape(html.unescape(ftfy.fix_text(text))).strip().replace("_", " ")
    return " ".join(fixed.translate(str.maketrans("", "", string.punctuation)).lower().split())


@settings(max_examples=500)
@given(st.text(st.characters(max_codepoint=0x7F)) | st.text(st.sampled_from('a &;<>#x41amp\t"')))
def test_ascii_takes_a_short_way_to_the_same_text(text):
    assert canonicalize(text) == official(text)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("normalization", ["none", "openclip"])
def test_special_tokens_in_a_query_are_plain_text(tmp_path, special, normalization):
    tokenizer = toy_tokenizer(tmp_path, normalization=normalization)
    queries = tokenizer([f"red {special} circle"])
    length = int(queries.text_length[0])
    ids = queries.text_ids[0, :length].tolist()
    known = json.loads(toy_tokenizer_json())
    added = {token["id"]: token["content"] for token in known["added_tokens"]}
    added.pop(1)  # [UNK] is what an unknown piece of plain text becomes
    assert (ids[0], ids[-1]) == (CLS, SEP)
    assert not set(ids[1:-1]) & set(added)
    assert len(ids) > 4


def test_ids_are_wrapped_padded_and_counted(tmp_path):
    queries = toy_tokenizer(tmp_path)(["red circle", "a"])
    assert queries.text_ids.shape == (2, 63)
    assert queries.text_ids.dtype == queries.text_length.dtype == np.int32
    vocab = json.loads(toy_tokenizer_json())["model"]["vocab"]
    assert queries.text_ids[0, :5].tolist() == [CLS, vocab["red"], vocab["circle"], SEP, 0]
    assert queries.text_length.tolist() == [4, 3]
    assert not queries.truncated.any()


@pytest.mark.parametrize(("words", "kept"), [(60, 60), (61, 61), (62, 61), (500, 61)])
def test_long_queries_keep_their_first_61_wordpieces(tmp_path, words, kept):
    text = " ".join("red" if i % 2 else "blue" for i in range(words))
    queries = toy_tokenizer(tmp_path)([text, "x"])
    assert queries.text_length.tolist() == [kept + 2, 3]
    assert queries.truncated.tolist() == [words > 61, False]
    assert queries.text_ids[0, kept + 1] == SEP
    short = toy_tokenizer(tmp_path)([" ".join(text.split()[:kept])])
    assert queries.text_ids[0].tolist() == short.text_ids[0].tolist()


@pytest.mark.parametrize(
    ("normalization", "query", "message"),
    [
        ("none", "", "is empty"),
        ("none", " \t", "is empty"),
        ("openclip", "!?", "is empty after normalization"),
        ("none", 7, "got int, expected a string"),
        ("none", "\ud800", "not valid Unicode"),
        ("none", "\x00\x01", "no wordpieces"),
    ],
)
def test_unusable_queries_are_refused(tmp_path, normalization, query, message):
    tokenizer = toy_tokenizer(tmp_path, normalization=normalization)
    with pytest.raises(RequestError, match=message):
        tokenizer([query])


def test_all_unusable_queries_are_named(tmp_path):
    with pytest.raises(RequestError) as caught:
        toy_tokenizer(tmp_path)(["red", "", None])
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["query 1", "query 2"]


@given(st.text(max_size=60))
def test_any_text_gives_plain_ids_or_a_request_error(tmp_path_factory, text):
    tokenizer = toy_tokenizer(tmp_path_factory.getbasetemp())
    try:
        queries = tokenizer([text])
    except RequestError:
        return
    length = int(queries.text_length[0])
    inner = queries.text_ids[0, 1 : length - 1]
    assert 3 <= length <= 63
    assert not np.isin(inner, (0, CLS, SEP, 4)).any()
    assert not queries.text_ids[0, length:].any()


def test_missing_or_broken_tokenizer_says_so(tmp_path):
    spec = TextSpec("none", 61, CLS, SEP, 0)
    with pytest.raises(EngineError, match=r"cannot read .*tokenizer\.json"):
        QueryTokenizer.open(tmp_path, spec)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(EngineError, match="edje build"):
        QueryTokenizer.open(tmp_path, spec)


def test_unknown_normalization_is_refused(tmp_path):
    with pytest.raises(EngineError, match="'loud'"):
        toy_tokenizer(tmp_path, normalization="loud")
