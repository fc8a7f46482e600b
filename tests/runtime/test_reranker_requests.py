"""What a reranker is asked: any iterable, checked before any work, and what stopping leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edje import StoppedError
from edje.errors import RequestError
from edje.runtime.reranker import Reranker
from edje.runtime.residency import ResidencyOptions
from edje.runtime.store import TokenStore
from toy_engine import ToyEngine, toy_manifest, toy_store, toy_tokenizer

NUM_IMAGES = 40
IDS = [f"img-{number}" for number in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenStore]:
    """Image `img-i` scores i % 7, and what the query adds."""
    values = np.arange(NUM_IMAGES) % 7
    with toy_store(tmp_path_factory.mktemp("requests") / "store", values) as opened:
        yield opened


@pytest.fixture(scope="module")
def reranker(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reranker]:
    tokenizer = toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with Reranker(ToyEngine(), tokenizer, store) as opened:
        yield opened


@pytest.fixture(scope="module")
def cascade(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reranker]:
    tokenizer = toy_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    engines = ToyEngine(toy_manifest()), ToyEngine(toy_manifest(max_pairs=1))
    with Reranker(engines[0], tokenizer, store, rescore=engines[1], rescore_margin=0.1) as opened:
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
def test_any_iterable_of_candidates_is_ranked_as_its_list(
    reranker: Reranker, one_shot: Any
) -> None:
    hits = reranker.rank("red", one_shot(IDS)).hits
    assert hits == reranker.rank("red", IDS).hits
    assert {type(hit.id) for hit in hits} == {str}


@pytest.mark.parametrize(
    "one_shot",
    [iter, lambda pairs: (pair for pair in pairs), lambda pairs: map(list, pairs), np.array],
)
def test_any_iterable_of_pairs_is_scored_as_its_list(reranker: Reranker, one_shot: Any) -> None:
    pairs = list(zip(["red", "blue"] * 20, IDS, strict=True))
    assert np.array_equal(reranker.predict(one_shot(pairs)), reranker.predict(pairs))
    scores = reranker.predict(zip(["red", "blue"] * 20, IDS, strict=True))
    assert np.array_equal(scores, reranker.predict(pairs))


@pytest.mark.parametrize("kind", [set, frozenset])
def test_pairs_without_an_order_are_refused(reranker: Reranker, kind: Any) -> None:
    with pytest.raises(RequestError, match=r"pairs is .* in the order of what belongs to them"):
        reranker.predict(kind([("red", "img-1"), ("blue", "img-2")]))


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
def test_what_cannot_be_ranked_is_refused_before_any_work(reranker: Reranker, case: str) -> None:
    arguments, message = WRONG[case]
    with pytest.raises(RequestError) as caught:
        reranker.rank(**{"query": "red", "cancelled": pytest.fail, **arguments})  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_all_faults_of_a_request_come_together(reranker: Reranker) -> None:
    with pytest.raises(RequestError) as caught:
        reranker.rank(b"red", [1], "3", timeout_s="1", missing="no")  # type: ignore[arg-type]
    assert len(caught.value.faults) == 5
    with pytest.raises(RequestError) as caught:
        reranker.predict([("red", 1), (2, "img-0"), "ab", {"q", "i"}], timeout_s=-1)  # type: ignore[list-item]
    assert len(caught.value.faults) == 4


def test_numbers_of_numpy_are_numbers(reranker: Reranker) -> None:
    assert len(reranker.rank("red", IDS, np.int32(3), timeout_s=np.float32(60))) == 3


NO_PAIRS = [{"red": "img-0"}, "ab", [{"red": 1, "img-0": 2}], ["ab"], ["ab", "cde"], 3, [3]]


@pytest.mark.parametrize("pairs", [*NO_PAIRS, [("", "img-0")]])
def test_pairs_that_are_none_are_refused(reranker: Reranker, pairs: Any) -> None:
    with pytest.raises(RequestError, match="pairs" if pairs in NO_PAIRS else "is empty"):
        reranker.predict(pairs)


def test_missing_candidates_are_skipped_and_named_in_their_order(reranker: Reranker) -> None:
    asked = ["ghost", "img-3", "img-6", "spook", "img-3", "ghost"]
    result = reranker.rank("red", (name for name in asked), missing="skip")
    assert [(hit.id, hit.index) for hit in result] == [("img-6", 2), ("img-3", 1), ("img-3", 4)]
    missing = [(fault.id, fault.index) for fault in result.missing]
    assert missing == [("ghost", 0), ("spook", 3), ("ghost", 5)]
    assert (result.num_asked, result.num_scored, result.errors) == (6, 3, ())
    values = result.to_json()
    assert [fault["id"] for fault in values["missing"]] == ["ghost", "spook", "ghost"]
    assert (values["num_asked"], values["num_scored"]) == (6, 3)
    assert [hit.score for hit in result] == [
        hit.score for hit in reranker.rank("red", ["img-6", "img-3", "img-3"])
    ]


def test_a_ranking_of_nothing_but_missing_candidates_is_empty(reranker: Reranker) -> None:
    result = reranker.rank("red", ["ghost", "spook"], 5, missing="skip")
    assert (result.hits, result.num_asked, result.num_scored) == ((), 2, 0)
    assert [fault.id for fault in result.missing] == ["ghost", "spook"]


def test_missing_candidates_refuse_the_request_unless_skipped(reranker: Reranker) -> None:
    for call in (
        lambda: reranker.rank("red", ["img-0", "ghost"]),
        lambda: reranker.rank("red", ["img-0", "ghost"], missing="error"),
        lambda: reranker.predict([("red", "ghost")]),
    ):
        with pytest.raises(RequestError, match=r"1 of [12] ids are not in the store"):
            call()


def test_a_cascade_skips_missing_candidates_too(cascade: Reranker) -> None:
    result = cascade.rank("red", ["ghost", *IDS], 3, missing="skip")
    assert [hit.id for hit in result] == ["img-6", "img-13", "img-20"]
    assert (result.num_asked, result.num_scored) == (41, 40)
    assert [fault.index for fault in result.missing] == [0]


def test_a_stopped_ranking_carries_what_was_scored(reranker: Reranker) -> None:
    asked = ["ghost", *IDS]
    whole = {hit.id: hit for hit in reranker.rank("red", asked, missing="skip")}
    seen = set()
    for num_asked in range(6):
        with pytest.raises(StoppedError, match="cancelled") as caught:
            reranker.rank("red", asked, missing="skip", cancelled=after(num_asked))
        error, known = caught.value, caught.value.partial
        assert error.num_scored == known.num_scored == len(known.hits)
        assert error.num_asked == known.num_asked == 41
        assert f"{error.num_scored} of 41 have a score" in str(error)
        assert [whole[hit.id] for hit in known] == list(known)
        scores = [hit.score for hit in known]
        assert scores == sorted(scores, reverse=True)
        assert (known.errors, [fault.id for fault in known.missing]) == ((), ["ghost"])
        assert known.engine == reranker.rank("red", ["img-0"]).engine
        seen.add(error.num_scored)
    assert 0 in seen
    assert max(seen) in range(8, 40)


def test_a_deadline_that_has_passed_leaves_an_empty_ranking(reranker: Reranker) -> None:
    with pytest.raises(StoppedError, match=r"deadline passed .*: 0 of 40 have a score") as caught:
        reranker.rank("red", timeout_s=0)
    assert (caught.value.partial.hits, caught.value.num_asked) == ((), 40)


def test_a_stopped_prediction_carries_the_scores_so_far(reranker: Reranker) -> None:
    pairs = [("red", name) for name in [*IDS, *IDS[::-1]]]
    whole = reranker.predict(pairs)
    with pytest.raises(StoppedError, match="of 80 have a score") as caught:
        reranker.predict(iter(pairs), cancelled=after(2))
    known = caught.value.partial
    scored = np.isfinite(known)
    assert (known.dtype, known.shape) == (np.float32, (80,))
    assert 0 < scored.sum() == caught.value.num_scored < 80 == caught.value.num_asked
    assert np.array_equal(known[scored], whole[scored])
    assert np.array_equal(known[:40], known[40:][::-1], equal_nan=True)


def test_a_cascade_that_is_stopped_shows_the_fast_ranking_under_its_name(
    cascade: Reranker, reranker: Reranker
) -> None:
    fast = reranker.rank("red", IDS)
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
