"""What users touch: order, ties, duplicates, any iterable, faults, stopping, closing."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.errors import EngineError, RequestError, StoppedError, StoreError
from edje.runtime.reranker import Reranker
from edje.runtime.residency import ResidencyOptions
from edje.runtime.results import EngineLabel, Hit
from edje.runtime.store import TokenStore
from toy_engine import FINGERPRINT, ToyEngine, toy_manifest, toy_store, toy_tokenizer
from waiting import stream_threads

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

    others = stream_threads()
    engine = ToyEngine(before=before)
    reranker = Reranker(engine, toy_tokenizer(tmp_path), store)
    (stream,) = stream_threads() - others
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
    assert not stream.is_alive()


def test_a_profile_that_is_too_short_for_a_query_says_so(tmp_path, store):
    engine = ToyEngine(toy_manifest(text_buckets=(8,)))
    with (
        Reranker(engine, toy_tokenizer(tmp_path), store) as reranker,
        pytest.raises(RequestError, match="up to 6 wordpieces"),
    ):
        reranker.rank("red " * 7, ids_of(1))


IDS = [f"img-{number}" for number in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reranker]:
    folder, engines = (
        tmp_path_factory.mktemp("two"),
        [ToyEngine(), ToyEngine(toy_manifest(max_pairs=1))],
    )
    with (
        toy_store(folder / "store", [i % 7 for i in range(NUM_IMAGES)]) as store,
        Reranker(
            engines[0], toy_tokenizer(folder), store, rescore=engines[1], rescore_margin=0.1
        ) as opened,
    ):
        yield opened


def after(num_asked: int) -> Callable[[], bool]:
    """Return what cancels a request when it was asked `num_asked` times."""
    answers = iter([False] * num_asked)
    return lambda: next(answers, True)


@pytest.mark.parametrize(
    "one_shot",
    [
        iter,
        lambda ids: (name for name in ids),
        lambda ids: map(str, ids),
        lambda ids: filter(None, ids),
        lambda ids: dict.fromkeys(ids).keys(),
        np.array,
    ],
)
def test_any_iterable_of_candidates_is_ranked_as_its_list(shared: Reranker, one_shot: Any) -> None:
    hits = shared.rank("red", one_shot(IDS)).hits
    assert hits == shared.rank("red", IDS).hits
    assert {type(hit.id) for hit in hits} == {str}


@pytest.mark.parametrize(
    "one_shot",
    [iter, lambda pairs: (pair for pair in pairs), lambda pairs: map(list, pairs), np.array],
)
def test_any_iterable_of_pairs_is_scored_as_its_list(shared: Reranker, one_shot: Any) -> None:
    pairs = list(zip(["red", "blue"] * 20, IDS, strict=True))
    assert np.array_equal(shared.predict(one_shot(pairs)), shared.predict(pairs))
    scores = shared.predict(zip(["red", "blue"] * 20, IDS, strict=True))
    assert np.array_equal(scores, shared.predict(pairs))


@pytest.mark.parametrize("kind", [set, frozenset])
def test_pairs_without_an_order_are_refused(shared: Reranker, kind: Any) -> None:
    with pytest.raises(RequestError, match=r"pairs is .* in the order of what belongs to them"):
        shared.predict(kind([("red", "img-1"), ("blue", "img-2")]))


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "a lone id": ({"candidates": "img-0"}, "candidates: got the string 'img-0'"),
    "lone bytes": ({"candidates": b"img-0"}, "candidates: got the bytes"),
    "a mapping": ({"candidates": {"img-0": 1.0}}, "candidates: got a dict"),
    "numbers": ({"candidates": [1, 2]}, "2 candidates are not strings: 1, 2"),
    "a number": ({"candidates": 3}, "candidates is 3"),
    "bytes as query": ({"query": b"red"}, "query is b'red'"),
    "no query": ({"query": None}, "query is None"),
    "an empty query": ({"query": ""}, "is empty"),
    "no hits": ({"top_k": 0}, "top_k is 0"),
    "queries": ({"query": ["red"]}, "query is an object of type list"),
    "top_k as text": ({"top_k": "3"}, "top_k is '3'"),
    "top_k as float": ({"top_k": 2.0}, "top_k is 2.0"),
    "top_k as bool": ({"top_k": True}, "top_k is True"),
    "timeout as text": ({"timeout_s": "1"}, "timeout_s is '1'"),
    "timeout as bool": ({"timeout_s": True}, "timeout_s is True"),
    "no time": ({"timeout_s": float("nan")}, "timeout_s is nan"),
    "no function": ({"cancelled": True}, "cancelled is True"),
    "another word": ({"missing": "ignore"}, "missing is 'ignore'"),
    "a flag": ({"missing": True}, "missing is True"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_ranked_is_refused_before_any_work(shared: Reranker, case: str) -> None:
    arguments, message = WRONG[case]
    with pytest.raises(RequestError) as caught:
        shared.rank(**{"query": "red", "cancelled": pytest.fail, **arguments})  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_all_faults_of_a_request_come_together(shared: Reranker) -> None:
    with pytest.raises(RequestError) as caught:
        shared.rank(b"red", [1], "3", timeout_s="1", missing="no")  # type: ignore[arg-type]
    assert len(caught.value.faults) == 5
    with pytest.raises(RequestError) as caught:
        shared.predict([("red", 1), (2, "img-0"), "ab", {"q", "i"}], timeout_s=-1)  # type: ignore[list-item]
    assert len(caught.value.faults) == 4


def test_numbers_of_numpy_are_numbers(shared: Reranker) -> None:
    assert len(shared.rank("red", IDS, np.int32(3), timeout_s=np.float32(60))) == 3


NO_PAIRS = [{"red": "img-0"}, "ab", [{"red": 1, "img-0": 2}], ["ab"], ["ab", "cde"], 3, [3]]


@pytest.mark.parametrize("pairs", [*NO_PAIRS, [("", "img-0")]])
def test_pairs_that_are_none_are_refused(shared: Reranker, pairs: Any) -> None:
    with pytest.raises(RequestError, match="pairs" if pairs in NO_PAIRS else "is empty"):
        shared.predict(pairs)


def test_missing_candidates_are_skipped_and_named_in_their_order(shared: Reranker) -> None:
    asked = ["ghost", "img-3", "img-6", "spook", "img-3", "ghost"]
    result = shared.rank("red", (name for name in asked), missing="skip")
    assert [(hit.id, hit.index) for hit in result] == [("img-6", 2), ("img-3", 1), ("img-3", 4)]
    missing = [(fault.id, fault.index) for fault in result.missing]
    assert missing == [("ghost", 0), ("spook", 3), ("ghost", 5)]
    assert (result.num_asked, result.num_scored, result.errors) == (6, 3, ())
    values = result.to_json()
    assert [fault["id"] for fault in values["missing"]] == ["ghost", "spook", "ghost"]
    assert (values["num_asked"], values["num_scored"]) == (6, 3)
    assert [hit.score for hit in result] == [
        hit.score for hit in shared.rank("red", ["img-6", "img-3", "img-3"])
    ]


def test_a_ranking_of_nothing_but_missing_candidates_is_empty(shared: Reranker) -> None:
    result = shared.rank("red", ["ghost", "spook"], 5, missing="skip")
    assert (result.hits, result.num_asked, result.num_scored) == ((), 2, 0)
    assert [fault.id for fault in result.missing] == ["ghost", "spook"]


def test_missing_candidates_refuse_the_request_unless_skipped(shared: Reranker) -> None:
    for call in (
        lambda: shared.rank("red", ["img-0", "ghost"]),
        lambda: shared.rank("red", ["img-0", "ghost"], missing="error"),
        lambda: shared.predict([("red", "ghost")]),
    ):
        with pytest.raises(RequestError, match=r"1 of [12] ids are not in the store"):
            call()


def test_a_cascade_skips_missing_candidates_too(cascade: Reranker) -> None:
    result = cascade.rank("red", ["ghost", *IDS], 3, missing="skip")
    assert [hit.id for hit in result] == ["img-6", "img-13", "img-20"]
    assert (result.num_asked, result.num_scored) == (41, 40)
    assert [fault.index for fault in result.missing] == [0]


def test_a_stopped_ranking_carries_what_was_scored(shared: Reranker) -> None:
    asked = ["ghost", *IDS]
    whole = {hit.id: hit for hit in shared.rank("red", asked, missing="skip")}
    seen = set()
    for num_asked in range(6):
        with pytest.raises(StoppedError, match="cancelled") as caught:
            shared.rank("red", asked, missing="skip", cancelled=after(num_asked))
        error, known = caught.value, caught.value.partial
        assert error.num_scored == known.num_scored == len(known.hits)
        assert error.num_asked == known.num_asked == 41
        assert f"{error.num_scored} of 41 have a score" in str(error)
        assert [whole[hit.id] for hit in known] == list(known)
        scores = [hit.score for hit in known]
        assert scores == sorted(scores, reverse=True)
        assert (known.errors, [fault.id for fault in known.missing]) == ((), ["ghost"])
        assert known.engine == shared.rank("red", ["img-0"]).engine
        seen.add(error.num_scored)
    assert 0 in seen
    assert max(seen) in range(8, 40)


def test_a_deadline_that_has_passed_leaves_an_empty_ranking(shared: Reranker) -> None:
    with pytest.raises(StoppedError, match=r"deadline passed .*: 0 of 40 have a score") as caught:
        shared.rank("red", timeout_s=0)
    assert (caught.value.partial.hits, caught.value.num_asked) == ((), 40)


def test_a_stopped_prediction_carries_the_scores_so_far(shared: Reranker) -> None:
    pairs = [("red", name) for name in [*IDS, *IDS[::-1]]]
    whole = shared.predict(pairs)
    with pytest.raises(StoppedError, match="of 80 have a score") as caught:
        shared.predict(iter(pairs), cancelled=after(2))
    known = caught.value.partial
    scored = np.isfinite(known)
    assert (known.dtype, known.shape) == (np.float32, (80,))
    assert 0 < scored.sum() == caught.value.num_scored < 80 == caught.value.num_asked
    assert np.array_equal(known[scored], whole[scored])
    assert np.array_equal(known[:40], known[40:][::-1], equal_nan=True)


def test_a_cascade_that_is_stopped_shows_the_fast_ranking_under_its_name(
    cascade: Reranker, shared: Reranker
) -> None:
    fast = shared.rank("red", IDS)
    counts = set()
    for num_asked in range(30):
        try:
            cascade.rank("red", IDS, 3, cancelled=after(num_asked))
        except StoppedError as error:
            known = error.partial
            counts.add(known.num_scored)
            assert known.rescoring is None
            assert (known.engine, known.num_asked) == (fast.engine, 40)
            assert len(known) == min(3, known.num_scored)
            if known.num_scored == 40:  # stopped while the precise engine was at work
                assert known.hits == fast.hits[:3]
        else:
            break
    assert num_asked > 6, "some stopped, and one was let through"
    assert {0, 40} < counts


def test_faults_met_before_the_stop_are_errors_of_the_partial_ranking(tmp_path: Any) -> None:
    values = [math.nan if number == 2 else 1 for number in range(20)]
    with (
        toy_store(tmp_path / "odd", values) as odd,
        Reranker(ToyEngine(), toy_tokenizer(tmp_path), odd) as reranker,
        pytest.raises(StoppedError) as caught,
    ):
        reranker.rank("red", IDS[:20], cancelled=after(2))
    known = caught.value.partial
    assert [fault.id for fault in known.errors] == ["img-2"]
    assert known.num_scored == len(known.hits) < 19


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": 3}, "engine is 3"),
        ({"store": 3}, "store is 3"),
        ({"store": b"s"}, "store is b's'"),
        ({"rescore": 3}, "rescore is 3"),
        ({"rescore_margin": "1"}, "rescore_margin is '1'"),
        ({"rescore_margin": True}, "rescore_margin is True"),
        ({"num_threads": "2"}, "num_threads is '2'"),
        ({"num_threads": 2.0}, "num_threads is 2.0"),
        ({"num_threads": True}, "num_threads is True"),
        ({"backend_settings": "a=b"}, "backend_settings is 'a=b'"),
        ({"backend_settings": {"a": 1}}, "backend_settings: 'a' is 1"),
        ({"device": 0}, "device is 0"),
        ({"device": ""}, "device is ''"),
        ({"residency": 3}, "residency: got 3"),
        ({"graphs": "no"}, "graphs is 'no'"),
    ],
)
def test_what_cannot_be_opened_so_is_refused_before_anything_is_opened(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        Reranker.open(**{"engine": "nowhere", "store": "nowhere", **arguments})  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_closed_store_is_refused_at_opening(store: TokenStore) -> None:
    closed = TokenStore.open(store.path)
    closed.close()
    with pytest.raises(RequestError, match=r"store: the store .* is closed, expected an open"):
        Reranker.open("nowhere", store=closed)


def test_all_faults_of_opening_come_together() -> None:
    with pytest.raises(RequestError) as caught:
        Reranker.open(1, store=2, rescore=3, num_threads="4", device=5, residency=6, graphs=7)  # type: ignore[arg-type]
    assert len(caught.value.faults) == 7


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"place": "gpu"}, "residency: got 'gpu', expected disk, host, device, auto"),
        ({"place": ["disk"]}, "residency: got an object of type list"),
        ({"place": "device", "max_bytes": "4G"}, "max_bytes: got '4G'"),
        ({"place": "device", "max_bytes": 0}, "max_bytes: got 0, expected 1 or more"),
        ({"place": "device", "ids": "img-1"}, "ids: got the string 'img-1'"),
        ({"place": "device", "ids": iter([1, "a"])}, "1 ids are not strings: 1"),
        ({"place": "device", "ids": {"a": 1}}, "ids: got a dict"),
        ({"place": "host", "max_bytes": 5}, 'max_bytes: only where residency is "device"'),
        ({"ids": ["img-1"]}, 'ids: only where residency is "device"'),
    ],
)
def test_a_residency_that_cannot_be_meant_is_refused_when_made(
    wish: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError) as caught:
        ResidencyOptions(**wish)
    assert says in str(caught.value)


def test_all_faults_of_a_residency_come_together() -> None:
    with pytest.raises(RequestError) as caught:
        ResidencyOptions("device", max_bytes=-1, ids="img-1")
    assert len(caught.value.faults) == 2


def test_the_listed_images_of_a_residency_are_taken_once() -> None:
    wish = ResidencyOptions("device", ids=(name for name in np.array(IDS[:3])))
    assert wish.ids == ("img-0", "img-1", "img-2")
    assert wish == ResidencyOptions("device", ids=IDS[:3])
