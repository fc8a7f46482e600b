"""Queries files over a store: what is drawn, what is read, and every fault at once."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.errors import RequestError, StoreError
from edje.runtime.queries import StoreSamples
from edje.runtime.store import TokenStore
from edje.tokens import dequantize_tokens, quantize_tokens
from toy_engine import CLS, FINGERPRINT, HIDDEN, NUM_TOKENS, SEP, toy_store, toy_tokenizer

NUM_IMAGES = 30


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A store whose image `img-i` holds the value i everywhere, and a tokenizer."""
    folder = tmp_path_factory.mktemp("samples")
    with toy_store(folder / "a.store", range(NUM_IMAGES)) as store:
        yield store, toy_tokenizer(folder)


@pytest.fixture
def sampled(parts, tmp_path):
    """Make samples of a file with these lines: `sampled("a red circle", name="q.jsonl")`."""

    def make(*lines, name="queries.txt", **options):
        path = tmp_path / name
        path.write_text("\n".join(lines), encoding="utf-8")
        return StoreSamples(*parts, path, **options)

    return make


def values_of(sample):
    """Which images a sample holds: `img-i` is the number i everywhere."""
    assert (sample.tokens == sample.tokens[:, :1, :1]).all()
    return sample.tokens[:, 0, 0].astype(int).tolist()


def test_a_line_is_a_query_and_perhaps_its_target(sampled):
    samples = sampled("a red circle\timg-7", "", "blue\r", num_candidates=5)
    first, second = samples
    assert first.text_ids.tolist()[0] == CLS
    assert first.text_ids.tolist()[-1] == SEP
    assert (len(first.text_ids), len(second.text_ids)) == (5, 3)
    assert first.tokens.shape == (5, NUM_TOKENS, HIDDEN)
    assert values_of(first)[first.target] == 7
    assert second.target is None
    assert len(samples) == 2
    assert not samples.random
    assert samples.data == (
        "2 queries of queries.txt, 5 candidates each of the 30 images of a.store, seed 0"
    )


def test_the_suffix_of_json_lines_may_be_in_any_case(sampled):
    samples = sampled('{"query": "red", "candidates": ["img-1", "img-2"]}', name="q.JSONL")
    assert values_of(next(iter(samples))) == [1, 2]


@pytest.mark.parametrize("name", ["q.json", "q.txt", "q"])
def test_json_lines_under_another_name_are_refused(sampled, name):
    lines = ('{"query": "red"}', "{curly} words", ' {"query": "blue", "target": "img-1"}')
    with pytest.raises(RequestError, match=r"call a file of JSON lines \.jsonl") as caught:
        sampled(*lines, name=name)
    assert [fault[:7] for fault in caught.value.faults] == ["line 1:", "line 3:"]


def test_an_int8_store_is_read_dequantised_and_named(tmp_path):
    sizes = {"num_tokens": NUM_TOKENS, "hidden": HIDDEN, "fingerprint_encoder": FINGERPRINT}
    tokens = np.random.default_rng(0).standard_normal((4, NUM_TOKENS, HIDDEN)).astype(np.float16)
    queries = tmp_path / "queries.txt"
    queries.write_text("red\timg-2\n")
    ids = [f"img-{i}" for i in range(4)]
    with TokenStore.create(tmp_path / "int8.store", dtype="int8", **sizes) as store:
        store.append(ids, tokens)
        samples = StoreSamples(store, toy_tokenizer(tmp_path), queries)
        (sample,) = samples
    np.testing.assert_array_equal(sample.tokens, dequantize_tokens(*quantize_tokens(tokens)))
    assert sample.target == 2
    assert "4 images of int8.store (int8 tokens)" in samples.data


def test_a_small_store_is_ranked_whole(sampled):
    samples = sampled("red\timg-29", num_candidates=30)
    (sample,) = samples
    assert values_of(sample) == list(range(NUM_IMAGES))
    assert sample.target == 29
    assert "seed" not in samples.data


def test_json_lines_may_bring_their_candidates(sampled):
    lines = [
        {"query": "red", "target": "img-3", "candidates": ["img-9", "img-3"]},
        {"query": "blue", "target": "img-3", "candidates": ["img-1"]},
        {"query": "square", "target": "img-3"},
    ]
    samples = sampled(*map(json.dumps, lines), name="q.jsonl", num_candidates=4)
    own, missed, drawn = samples
    assert (values_of(own), own.target) == ([9, 3], 1)
    assert (values_of(missed), missed.target) == ([1], None)
    assert values_of(drawn)[drawn.target] == 3
    assert "1 to 4 candidates" in samples.data
    assert samples.data.endswith("1 targets are not among their candidates")


@pytest.mark.parametrize("name", ["queries.tsv", "queries.jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_query_or_an_id(sampled, name):
    """Windows tools write it, and `cat` of two such files leaves one inside."""
    line = "{}\t{}\r" if name.endswith(".tsv") else '{{"query": "{}", "target": "{}"}}\r'
    lines = [line.format("red", "img-3"), line.format("blue", "img-4")]
    plain = sampled(*lines, name=name)
    marked = sampled(*(f"\ufeff{line}" for line in lines), name=f"marked-{name}")
    assert len(marked) == 2
    assert marked.fingerprint == plain.fingerprint


@settings(max_examples=30, deadline=None)
@given(
    targets=st.lists(st.integers(0, NUM_IMAGES - 1), min_size=1, max_size=9),
    num_candidates=st.integers(2, NUM_IMAGES + 3),
    max_queries=st.none() | st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_a_draw_is_distinct_holds_the_target_and_does_not_depend_on_the_others(
    parts, tmp_path_factory, targets, num_candidates, max_queries, seed
):
    path = tmp_path_factory.mktemp("draw") / "queries.txt"
    path.write_text("".join(f"red\timg-{target}\n" for target in targets))
    options = {"num_candidates": num_candidates, "seed": seed}
    everything = [values_of(sample) for sample in StoreSamples(*parts, path, **options)]
    samples = StoreSamples(*parts, path, max_queries=max_queries, **options)
    assert len(samples) == min(max_queries or len(targets), len(targets))
    for sample in samples:
        values = values_of(sample)
        assert len(set(values)) == len(values) == min(num_candidates, NUM_IMAGES)
        assert values[sample.target] in targets
        assert values in everything


def test_candidates_vary_with_the_seed_and_between_queries(sampled):
    first, second = sampled("red", "red", num_candidates=8)
    assert values_of(first) != values_of(second)
    other = next(iter(sampled("red", "red", num_candidates=8, seed=1)))
    assert values_of(first) != values_of(other)


def test_the_fingerprint_covers_what_is_yielded_and_not_where_it_lies(sampled, parts, tmp_path):
    lines = ("a red circle\timg-7", "blue")
    prints = [
        sampled(*lines).fingerprint,
        sampled(*lines, num_candidates=4).fingerprint,
        sampled(*lines, num_candidates=4, seed=1).fingerprint,
        sampled(*lines, max_queries=1).fingerprint,
        sampled("a red circle\timg-8", "blue").fingerprint,
        sampled("a red square\timg-7", "blue").fingerprint,
    ]
    with toy_store(tmp_path / "b.store", [*range(NUM_IMAGES - 1), 77]) as other:
        path = tmp_path / "queries.txt"
        path.write_text("\n".join(lines))
        prints.append(StoreSamples(other, parts[1], path).fingerprint)
    assert len(set(prints)) == len(prints)
    moved = sampled("", *lines, "", name="elsewhere.txt")
    assert moved.fingerprint == prints[0]


def test_tokens_are_read_when_iterated_and_verified(parts, tmp_path):
    store = toy_store(tmp_path / "store", range(4))
    (tmp_path / "q.txt").write_text("red\n")
    samples = StoreSamples(store, parts[1], tmp_path / "q.txt")
    [segment] = (tmp_path / "store" / "segments").iterdir()
    content = bytearray(segment.read_bytes())
    content[4096] ^= 1
    segment.write_bytes(content)
    with samples, pytest.raises(StoreError, match="img-0"):
        list(samples)
    with pytest.raises(StoreError, match="closed"):
        list(samples)


def test_all_faults_of_a_text_file_at_once(sampled):
    with pytest.raises(RequestError) as caught:
        sampled("red\timg-3", "blue\tnowhere", " \timg-1", "a\tb\tc", "red\t", "x\t")
    assert caught.value.faults == (
        "line 4: got 3 fields between tabs, expected a query and a target id",
        "line 5: the target id behind the tab is empty",
        "line 6: the target id behind the tab is empty",
        "line 3: ' ' is empty, expected some text",
        "line 2: not in the store: 'nowhere'",
    )


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        ("[]", "got list"),
        ('{"query": 3}', "query: got 3"),
        ('{"target": "img-1"}', "query: got None"),
        ('{"query": "x", "target": 3}', "target: got 3"),
        ('{"query": "x", "candidates": []}', "expected a list of ids"),
        ('{"query": "x", "candidates": "img-1"}', "expected a list of ids"),
        ('{"query": "x", "candidates": ["img-1", "img-1"]}', "1 ids come twice"),
        ('{"query": "x", "candidates": ["img-1", "no", "none"]}', "store: 'no', 'none'"),
        ('{"query": "x", "image": "img-1"}', "unknown keys: 'image'"),
    ],
)
def test_faults_of_json_lines(sampled, line, fault):
    with pytest.raises(RequestError) as caught:
        sampled('{"query": "red"}', line, name="q.jsonl")
    (found,) = caught.value.faults
    assert found.startswith("line 2: ")
    assert fault in found


def test_twenty_faults_and_the_count_of_the_rest(sampled):
    with pytest.raises(RequestError) as caught:
        sampled(*(f"red\tno-{i}" for i in range(25)))
    assert len(caught.value.faults) == 21
    assert caught.value.faults[-1] == "and 5 more"


def test_files_that_hold_nothing_or_no_text(sampled, parts, tmp_path):
    with pytest.raises(RequestError, match="it holds no query"):
        sampled("", " ")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(RequestError, match="not UTF-8"):
        StoreSamples(*parts, tmp_path / "latin")
    with pytest.raises(RequestError, match="No such file"):
        StoreSamples(*parts, tmp_path / "nowhere")
    with pytest.raises(RequestError) as caught:
        sampled("red", num_candidates=1, max_queries=0)
    assert len(caught.value.faults) == 2


def test_open_refuses_a_store_of_another_encoder(tiny_bundle, tiny_store, tmp_path):
    (tmp_path / "q.txt").write_text("a dog\timg-3\n")
    with StoreSamples.open(tiny_store, tiny_bundle, tmp_path / "q.txt") as samples:
        (sample,) = samples
        assert (len(sample.tokens), sample.target) == (12, 3)
    toy_store(tmp_path / "other", range(3)).close()
    with pytest.raises(StoreError) as caught:
        StoreSamples.open(tmp_path / "other", tiny_bundle, tmp_path / "q.txt")
    assert FINGERPRINT in str(caught.value)
    assert len(caught.value.faults) == 2
    shutil.rmtree(tmp_path / "other")
