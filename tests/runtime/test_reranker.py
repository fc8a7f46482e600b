"""What users touch: order, ties, duplicates, faults, many threads, closing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.errors import EngineError, RequestError, StoreError
from edje.runtime.reranker import Reranker
from edje.runtime.results import EngineLabel, Hit
from edje.runtime.store import TokenStore
from toy_engine import FINGERPRINT, ToyEngine, toy_manifest, toy_store, toy_tokenizer

NUM_IMAGES = 40


@pytest.fixture
def store(tmp_path):
    with toy_store(tmp_path / "store", [i % 7 for i in range(NUM_IMAGES)]) as store:
        yield store


@pytest.fixture
def engine():
    return ToyEngine()


@pytest.fixture
def reranker(tmp_path, engine, store):
    with Reranker(engine, toy_tokenizer(tmp_path), store) as reranker:
        yield reranker


def ids_of(*numbers: int) -> list[str]:
    return [f"img-{number}" for number in numbers]


def test_hits_are_sorted_and_carry_id_score_and_place(reranker):
    result = reranker.rank("x", ids_of(1, 6, 3))
    assert [(hit.id, hit.index) for hit in result] == [("img-6", 1), ("img-3", 2), ("img-1", 0)]
    extra = result[0].score - 6
    assert [hit.score - extra for hit in result] == [6.0, 3.0, 1.0]
    assert result[0] == Hit("img-6", 6.0 + extra, 1)
    assert len(result) == 3
    assert result[:2] == result.hits[:2]
    assert result.errors == ()


def test_the_result_says_what_ran_and_how_long_it_took(reranker):
    result = reranker.rank("red circle", ids_of(*range(20)))
    assert result.engine == EngineLabel("toy", "fp32", "host")
    times = result.timings_ms
    assert min(times.tokenize, times.resolve, times.gather, times.compute) > 0
    assert times.total >= times.tokenize + times.resolve


def test_ties_keep_the_order_of_the_candidates(reranker):
    candidates = ids_of(14, 0, 7, 21, 8, 1)  # two groups of equal scores
    assert [hit.id for hit in reranker.rank("x", candidates)] == ids_of(8, 1, 14, 0, 7, 21)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, NUM_IMAGES - 1), max_size=60), st.integers(1, 70))
def test_ranking_is_a_stable_sort_of_the_candidates(shared, numbers, top_k):
    result = shared.rank("a red circle", ids_of(*numbers), top_k)
    order = sorted(range(len(numbers)), key=lambda place: -(numbers[place] % 7))[:top_k]
    assert [hit.index for hit in result] == order


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    with (
        toy_store(folder / "store", [i % 7 for i in range(NUM_IMAGES)]) as store,
        Reranker(ToyEngine(), toy_tokenizer(folder), store) as reranker,
    ):
        yield reranker


def test_duplicates_are_scored_once_and_equal(reranker, engine):
    result = reranker.rank("x", ids_of(3, 3, 5, 3))
    assert [hit.index for hit in result] == [2, 0, 1, 3]
    assert len({hit.score for hit in result if hit.id == "img-3"}) == 1
    assert sum(num_pairs for num_pairs, _ in engine.batches) == 2


def test_no_candidates_give_an_empty_result(reranker, engine):
    result = reranker.rank("x", [])
    assert (len(result), result.errors, engine.batches) == (0, (), [])


def test_without_candidates_the_whole_store_is_ranked(reranker):
    assert sorted(hit.id for hit in reranker.rank("x")) == sorted(ids_of(*range(NUM_IMAGES)))


def test_long_queries_are_cut_and_reported(reranker):
    assert not reranker.rank("red " * 61, ids_of(1)).truncated
    cut = reranker.rank("red " * 61 + "blue", ids_of(1))
    assert cut.truncated
    assert cut[0].score == reranker.rank("red " * 61, ids_of(1))[0].score


def test_unknown_ids_are_counted_and_named_up_to_twenty(reranker):
    with pytest.raises(RequestError, match="25 of 26") as caught:
        reranker.rank("x", ["img-0", *(f"ghost-{i}" for i in range(25))])
    assert "'ghost-19'" in str(caught.value)
    assert "'ghost-20'" not in str(caught.value)


def test_predict_scores_mixed_queries_in_order(reranker):
    queries = ("x", "red circle", "a " * 30)
    pairs = [(queries[i % 3], f"img-{i % 5}") for i in range(31)]
    scores = reranker.predict(pairs)
    assert scores.dtype == np.float32
    alone = {pair: reranker.rank(pair[0], [pair[1]])[0].score for pair in set(pairs)}
    assert scores.tolist() == [alone[pair] for pair in pairs]
    assert reranker.predict([]).shape == (0,)


def flip_a_byte_of(store: TokenStore, number: int) -> None:
    """Damage the record of image `number`; every record holds one value throughout."""
    flip_a_byte_at(store, store.layout.offset(number) + 5)


def flip_a_byte_at(store: TokenStore, offset: int) -> None:
    [segment] = sorted((store.path / "segments").iterdir())
    content = bytearray(segment.read_bytes())
    content[offset] ^= 1
    segment.write_bytes(content)


def test_a_damaged_record_is_an_error_entry_and_the_rest_is_ranked(reranker, store):
    flip_a_byte_of(store, 5)
    result = reranker.rank("x", ids_of(1, 5, 2, 5))
    assert [hit.id for hit in result] == ids_of(2, 1)
    assert [(fault.id, fault.index) for fault in result.errors] == [("img-5", 1), ("img-5", 3)]
    assert "damaged" in result.errors[0].reason
    with pytest.raises(StoreError, match="'img-5': its stored record is damaged"):
        reranker.predict([("x", "img-1"), ("x", "img-5")])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_an_error_entry(tmp_path, value):
    with (
        toy_store(tmp_path / "odd", [1, value, 3]) as store,
        Reranker(ToyEngine(), toy_tokenizer(tmp_path), store) as reranker,
    ):
        result = reranker.rank("x")
        assert [hit.id for hit in result] == ids_of(2, 0)
        assert [fault.id for fault in result.errors] == ids_of(1)
        assert str(value) in result.errors[0].reason


def test_an_int8_store_is_ranked_and_named_and_damage_and_nan_are_found(tmp_path):
    values = [3, np.nan, 1, 7, 2]
    with toy_store(tmp_path / "int8", values, dtype="int8") as store:
        flip_a_byte_at(store, store.layout.offset(3) + 5)
        flip_a_byte_at(store, store.layout.scales_offset(4) + 1)
        for token_dtype in ("float16", "int8"):
            engine = ToyEngine(replace(toy_manifest(), token_dtype=token_dtype))
            with Reranker(engine, toy_tokenizer(tmp_path), store) as reranker:
                result = reranker.rank("x")
                assert [hit.id for hit in result] == ids_of(0, 2)
                assert abs(result[0].score - result[1].score - 2) < 0.01
                assert [fault.id for fault in result.errors] == ids_of(1, 3, 4)
                assert result.engine == EngineLabel("toy", "fp32", "host", "int8")


def test_an_int8_engine_refuses_a_float16_store_and_says_both_ways_out(tmp_path, store):
    engine = ToyEngine(replace(toy_manifest(), token_dtype="int8"))
    with pytest.raises(StoreError, match="was not made for this engine") as caught:
        Reranker(engine, toy_tokenizer(tmp_path), store)
    assert caught.value.faults == (
        "dtype: the store holds float16 tokens, the engine reads int8 ones",
    )
    assert "--dtype int8" in caught.value.hint
    assert "without --tokens int8" in caught.value.hint


def test_a_store_of_another_encoder_is_refused_with_both_fingerprints(tmp_path):
    with toy_store(tmp_path / "other", [1], fingerprint_encoder="a" * 64) as store:
        with pytest.raises(StoreError) as caught:
            Reranker(ToyEngine(), toy_tokenizer(tmp_path), store)
        assert {"a" * 64, FINGERPRINT} <= set(str(caught.value).replace(",", "").split())
        assert "edje index" in caught.value.hint


def test_an_engine_failure_reaches_the_caller_and_the_reranker_lives_on(reranker, engine):
    engine.before = lambda batch: 1 / 0
    with pytest.raises(EngineError, match="division by zero"):
        reranker.rank("x", ids_of(1, 2))
    engine.before = None
    assert len(reranker.rank("x", ids_of(1, 2))) == 2


def test_close_waits_for_work_refuses_the_rest_and_frees_everything(tmp_path, store):
    entered, release = threading.Event(), threading.Event()

    def before(batch):
        entered.set()
        release.wait(10)

    before_threads = set(threading.enumerate())
    engine = ToyEngine(before=before)
    reranker = Reranker(engine, toy_tokenizer(tmp_path), store)
    with ThreadPoolExecutor(4) as pool:
        short = pool.submit(reranker.rank, "x", ids_of(1, 2))
        assert entered.wait(10)
        closing = pool.submit(reranker.close)
        threading.Event().wait(0.02)
        assert not closing.done()
        assert not engine.closed
        release.set()
        closing.result(10)
        assert len(short.result(10)) == 2
    assert engine.closed
    with pytest.raises(EngineError, match="is closed"):
        reranker.rank("x", ids_of(1))
    reranker.close()
    assert len(store.rows(["img-0"])) == 1  # the caller's store is still open
    assert set(threading.enumerate()) <= before_threads


def test_a_profile_that_is_too_short_for_a_query_says_so(tmp_path, store):
    engine = ToyEngine(toy_manifest(text_buckets=(8,)))
    with (
        Reranker(engine, toy_tokenizer(tmp_path), store) as reranker,
        pytest.raises(RequestError, match="up to 6 wordpieces"),
    ):
        reranker.rank("red " * 7, ids_of(1))
