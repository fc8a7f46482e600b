"""A cascade's top k is the precise engine's, whatever the fast one says within the margin."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.engines.agreement import SAFETY
from edje.engines.manifest import EngineManifest
from edje.errors import EngineError, RequestError
from edje.runtime.cascade import hops_of, learned_margin
from edje.runtime.reranker import Reranker
from edje.runtime.results import EngineLabel
from edje.runtime.survivors import Rule
from oracle import Oracle
from toy_engine import (
    REAL,
    FastEngine,
    ToyEngine,
    fast_manifest,
    precise_manifest,
    toy_store,
    toy_tokenizer,
)
from waiting import stream_threads

NUM_IMAGES = 60


grid = st.integers(-6, 6).map(lambda value: value / 4)  # coarse: ties are common
odd = st.sampled_from([math.nan, math.inf, -math.inf])
pair = st.tuples(st.one_of(grid, grid, grid, odd), st.one_of(grid, grid, grid, grid, odd))


def best(scores: np.ndarray, k: int) -> list[tuple[int, float]]:
    """Places and scores of the `k` best finite ones, ties in order."""
    order = np.argsort(-scores, kind="stable")
    return [(i, float(scores[i])) for i in order[np.isfinite(scores[order])][:k].tolist()]


def arrays(pairs: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray, float]:
    """Fast scores, precise scores, and how far they differ at most."""
    fast, precise = np.array(pairs, np.float32).reshape(-1, 2).T
    both = np.isfinite(fast) & np.isfinite(precise)
    difference = np.abs(precise[both].astype(np.float64) - fast[both])
    return fast, precise, float(difference.max(initial=0.0))


@settings(max_examples=400, deadline=None)
@given(st.lists(pair, max_size=60), st.integers(1, 70), st.integers(1, 20))
def test_the_top_k_is_the_precise_one_and_no_round_too_much_is_scored(pairs, top_k, per_round):
    fast, precise, margin = arrays(pairs)
    oracle = Oracle(precise)
    rule = Rule(margin=margin)
    found = oracle.rescore(fast, top_k=top_k, rule=rule, pairs_per_round=per_round)
    assert best(found.scores, top_k) == best(precise, top_k)
    assert sorted(oracle.asked) == np.flatnonzero(found.rescored).tolist()
    assert np.isnan(found.scores[~found.rescored]).all()
    assert (found.margin, found.num_widened) == (margin, 0)
    winners = best(precise, top_k)
    threshold = winners[-1][1] if len(winners) == top_k else -math.inf
    needed = np.count_nonzero(~np.isfinite(fast) | (fast + np.float64(margin) >= threshold))
    assert needed <= len(oracle.asked) < needed + per_round
    assert max(map(len, oracle.rounds), default=0) <= max(per_round, top_k)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-30, 30, width=32), st.floats(-2, 2)), min_size=1, max_size=80),
    st.integers(1, 12),
)
def test_scores_of_any_size_within_the_margin(pairs, top_k):
    precise, noise = np.array(pairs).T
    precise = precise.astype(np.float32)
    fast = (precise + noise).astype(np.float32)
    margin = float(np.abs(fast.astype(np.float64) - precise).max())
    found = Oracle(precise).rescore(fast, top_k=top_k, rule=Rule(margin=margin))
    assert best(found.scores, top_k) == best(precise, top_k)


def test_a_good_fast_engine_leaves_little_to_rescore():
    precise = np.linspace(10, -10, 1000, dtype=np.float32)
    fast = precise + np.random.default_rng(0).uniform(-0.1, 0.1, 1000).astype(np.float32)
    found = Oracle(precise).rescore(fast, top_k=10, rule=Rule(margin=0.1), pairs_per_round=8)
    assert best(found.scores, 10) == best(precise, 10)
    assert np.count_nonzero(found.rescored) <= 32


def test_a_margin_that_is_too_small_is_widened_and_the_rest_is_rescored():
    random = np.random.default_rng(1)
    precise = np.sort(random.uniform(-5, 5, 400).astype(np.float32))
    fast = precise + random.uniform(-1, 1, 400).astype(np.float32)
    found = Oracle(precise).rescore(fast, top_k=10, rule=Rule(margin=0.05))
    assert found.num_widened >= 1
    assert 1.0 <= found.margin <= 2.0  # although every difference in the first round is negative
    assert best(found.scores, 10) == best(precise, 10)


@pytest.mark.parametrize(("offset", "margin", "num_rescored"), [(-7, 7.0, 16), (7, 0.5, 17)])
def test_a_constant_offset_costs_no_more_than_itself(offset, margin, num_rescored):
    precise = np.arange(500, dtype=np.float32)
    found = Oracle(precise).rescore(precise + offset, top_k=10, rule=Rule(margin=0.5))
    assert found.margin == margin
    assert np.count_nonzero(found.rescored) == num_rescored
    assert best(found.scores, 10) == best(precise, 10)


@settings(max_examples=200, deadline=None)
@given(st.lists(pair, max_size=60), st.integers(1, 70))
def test_a_one_sided_bound_is_enough_for_the_right_top_k(pairs, top_k):
    fast, precise, _ = arrays(pairs)
    both = np.isfinite(fast) & np.isfinite(precise)
    margin = float((precise[both].astype(np.float64) - fast[both]).max(initial=0.0))
    rule = Rule(margin=margin)
    found = Oracle(precise).rescore(fast, top_k=top_k, rule=rule, pairs_per_round=4)
    assert best(found.scores, top_k) == best(precise, top_k)


@pytest.fixture
def store(tmp_path):
    values = [i * 37 % NUM_IMAGES // 2 for i in range(NUM_IMAGES)]  # every score twice
    with toy_store(tmp_path / "store", values) as store:
        yield store


@pytest.fixture
def engines():
    fast, precise = FastEngine(fast_manifest()), ToyEngine(precise_manifest())
    precise.running = fast.running  # the engine asserts that nobody else computes
    return fast, precise


@pytest.fixture
def cascade(tmp_path, engines, store):
    fast, precise = engines
    with Reranker(fast, toy_tokenizer(tmp_path), store, rescore=precise) as reranker:
        yield reranker


@pytest.fixture
def alone(tmp_path, store):
    with Reranker(ToyEngine(precise_manifest()), toy_tokenizer(tmp_path), store) as reranker:
        yield reranker


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, NUM_IMAGES - 1), max_size=90), st.integers(1, 40))
def test_rank_returns_the_precise_engines_hits(cascade_and_alone, numbers, top_k):
    cascade, alone = cascade_and_alone
    ids = [f"img-{number}" for number in numbers]
    assert cascade.rank("red circle", ids, top_k).hits == alone.rank("red circle", ids, top_k).hits


@pytest.fixture(scope="module")
def cascade_and_alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade")
    tokenizer = toy_tokenizer(folder)
    fast, precise = FastEngine(fast_manifest()), ToyEngine(precise_manifest())
    with (
        toy_store(folder / "store", np.arange(NUM_IMAGES) // 3) as store,
        Reranker(fast, tokenizer, store, rescore=precise, rescore_margin=1.6) as cascade,
        Reranker(ToyEngine(precise_manifest()), tokenizer, store) as alone,
    ):
        yield cascade, alone


def test_the_result_names_both_engines_and_what_was_rescored(cascade, engines):
    result = cascade.rank("red circle", top_k=3)
    rescoring = result.rescoring
    assert result.engine == EngineLabel("toy", "int8", "host")
    assert rescoring.engine == EngineLabel("toy", "fp32", "host")
    assert rescoring.num_rescored == sum(size for size, _ in engines[1].batches) < NUM_IMAGES
    assert rescoring.margin == pytest.approx(SAFETY * 2.0, abs=1e-5)
    assert rescoring.num_widened == 0
    assert 0 < rescoring.total_ms < result.timings_ms.total
    assert result.to_json()["rescoring"]["engine"]["precision"] == "fp32"


def test_a_margin_that_proves_too_small_is_reported(tmp_path, engines, store):
    fast, precise = engines
    with Reranker(
        fast, toy_tokenizer(tmp_path), store, rescore=precise, rescore_margin=0.01
    ) as reranker:
        rescoring = reranker.rank("red circle", top_k=3).rescoring
    assert rescoring.num_widened >= 1
    assert rescoring.margin > 0.01


def test_a_candidate_that_the_fast_engine_cannot_score_is_ranked(cascade, alone):
    ids = [f"img-{number}" for number in range(NUM_IMAGES)]
    rows = [i for i in range(NUM_IMAGES) if i * 37 % NUM_IMAGES // 2 == 13]
    some = [ids[i] for i in rows] + ids[:20]
    assert cascade.rank("x", some, 5).hits == alone.rank("x", some, 5).hits
    assert cascade.rank("x", some, 5).errors == ()


@pytest.mark.parametrize("top_k", [None, NUM_IMAGES])
def test_where_all_must_be_precise_the_precise_engine_works_alone(cascade, alone, engines, top_k):
    result = cascade.rank("x", top_k=top_k)
    assert result.hits == alone.rank("x", top_k=top_k).hits
    assert (result.engine.precision, result.rescoring) == ("fp32", None)
    assert engines[0].batches == []


def test_predict_gives_the_precise_engines_scores(cascade, alone, engines):
    pairs = [("red circle", "img-3"), ("x", "img-5")]
    assert cascade.predict(pairs).tolist() == alone.predict(pairs).tolist()
    assert engines[0].batches == []


def test_a_damaged_record_is_an_error_entry_skipped_ones_are_not(cascade, store):
    [segment] = sorted((store.path / "segments").iterdir())
    stride = (segment.stat().st_size - 4096) // NUM_IMAGES
    content = bytearray(segment.read_bytes())
    content[4096 + 5 * stride + 1] ^= 1
    segment.write_bytes(content)
    result = cascade.rank("x", top_k=2)
    assert [fault.id for fault in result.errors] == ["img-5"]
    assert "damaged" in result.errors[0].reason
    assert len(result) == 2


def test_many_threads_get_the_precise_answer_and_engines_never_compute_at_once(cascade, alone):
    lists = [[f"img-{(n * 7 + i) % NUM_IMAGES}" for i in range(20 + n % 40)] for n in range(64)]
    expected = [alone.rank("red circle", ids, 5).hits for ids in lists]
    with ThreadPoolExecutor(16) as pool:
        ranked = pool.map(lambda ids: cascade.rank("red circle", ids, 5).hits, lists)
        assert list(ranked) == expected


def test_an_engine_failure_in_the_second_pass_reaches_the_caller(cascade, engines):
    engines[1].before = lambda batch: 1 / 0
    with pytest.raises(EngineError, match="division by zero"):
        cascade.rank("x", top_k=3)
    engines[1].before = None
    assert len(cascade.rank("x", top_k=3)) == 3


def test_close_closes_both_engines_and_ends_their_threads(tmp_path, engines, store):
    others = stream_threads()
    reranker = Reranker(engines[0], toy_tokenizer(tmp_path), store, rescore=engines[1])
    (stream,) = stream_threads() - others  # one for both
    reranker.close()
    assert all(engine.closed for engine in engines)
    assert not stream.is_alive()


def test_engines_of_two_models_are_refused_and_both_are_named(tmp_path, store):
    fast = fast_manifest()
    other = replace(fast.bundle, fingerprint_scorer="1" * 64)
    precise = precise_manifest(bundle=other, token_dtype="int8")
    with pytest.raises(EngineError, match="cannot rerank together") as caught:
        Reranker(ToyEngine(fast), toy_tokenizer(tmp_path), store, rescore=ToyEngine(precise))
    scorer, dtype = caught.value.faults
    assert "0" * 64 in scorer
    assert "1" * 64 in scorer
    assert dtype == "token_dtype: the toy int8 engine has float16, the toy fp32 engine has int8"


@pytest.mark.parametrize("margin", [-0.1, math.nan, math.inf])
def test_a_margin_that_bounds_nothing_is_refused(tmp_path, engines, store, margin):
    tokenizer = toy_tokenizer(tmp_path)
    with pytest.raises(RequestError, match="rescore_margin is"):
        Reranker(engines[0], tokenizer, store, rescore=engines[1], rescore_margin=margin)


def test_a_margin_without_a_precise_engine_is_refused(tmp_path, engines, store):
    with pytest.raises(RequestError, match="without rescore"):
        Reranker(engines[0], toy_tokenizer(tmp_path), store, rescore_margin=1.0)


def test_the_margin_is_learned_from_both_engines():
    precise = precise_manifest(precision="fp16", fidelity={**REAL, "max_abs_diff": 0.5})
    assert learned_margin(fast_manifest(), precise) == SAFETY * 2.5
    overrating = fast_manifest(fidelity={**REAL, "max_underrating": -1.0})
    assert learned_margin(overrating, precise) == SAFETY * 0.5


def test_the_levels_of_the_margin_are_learned_where_they_were_measured():
    levels = [[-1.0, 0.0], [0.0, 0.25], [4.0, 1.0]]
    fast, precise = fast_manifest(fidelity={**REAL, "levels": levels}), precise_manifest()
    (hop,) = hops_of([fast, precise], None, None)
    assert [up_to for up_to, _ in hop.levels] == [-1.0, 0.0, 4.0]
    shares = [share for _, share in hop.levels]
    assert shares == pytest.approx([0.0, 0.25, 1.0], abs=1e-5)
    rounding = precise_manifest(precision="fp16", fidelity={**REAL, "max_abs_diff": 2.0})
    (hop,) = hops_of([fast, rounding], None, None)  # half of the margin is the precise engine's
    assert [share for _, share in hop.levels] == [0.5, 0.625, 1.0]
    assert not hops_of([fast, precise], 0.5, None)[0].levels
    assert not hops_of([fast_manifest(), precise], None, None)[0].levels


SATURATED = np.concatenate([np.linspace(5, 4, 5), np.linspace(-10, -10.1, 995)])
LEVELS = [(-9.0, 0.02), (9.0, 1.0)]


def test_where_low_scores_err_less_few_are_scored_again():
    random = np.random.default_rng(0)
    sizes = np.where(SATURATED < 0, 0.005, 0.25)
    fast = SATURATED + sizes * random.uniform(-1, 1, 1000)
    precise = SATURATED
    flat = Oracle(precise).rescore(fast, top_k=10, rule=Rule(margin=0.25))
    found = Oracle(precise).rescore(fast, top_k=10, rule=Rule(margin=0.25, levels=LEVELS))
    assert best(found.scores, 10) == best(precise.astype(np.float32), 10)
    assert np.count_nonzero(flat.rescored) == 1000
    assert np.count_nonzero(found.rescored) < 300


def test_what_contradicts_the_share_of_low_scores_widens_the_margin():
    precise = np.linspace(-10.0, -10.1, 1000)
    fast = precise.copy()
    fast[15] -= 0.02  # a level's share of the margin is 0.005
    fast[400] -= 0.035
    found = Oracle(precise).rescore(fast, top_k=300, rule=Rule(margin=0.25, levels=LEVELS))
    assert found.num_widened
    assert best(found.scores, 300) == best(precise.astype(np.float32), 300)


@pytest.mark.parametrize(
    ("fast", "precise"),
    [
        ({"fidelity": {}}, {}),
        ({"fidelity": {"measured_on": "not measured on a device"}}, {}),
        ({"fidelity": {**REAL, "random": True}}, {}),
        ({"fidelity": {**REAL, "max_underrating": math.inf}}, {}),
        ({}, {"precision": "fp16"}),  # random pairs say nothing about it
        ({}, {"fidelity": {}}),
    ],
)
def test_without_figures_of_real_pairs_no_margin_is_learned(fast, precise):
    with pytest.raises(EngineError, match="no margin can be learned") as caught:
        learned_margin(fast_manifest(**fast), precise_manifest(**precise))
    assert "edje verify" in caught.value.hint
    assert "rescore_margin" in caught.value.hint


SHALLOW = {"layers": 1, "fidelity": {**REAL, "num_queries": 4, "num_pairs": 80}}


def three_layers(manifest: EngineManifest, layers: int = 3) -> EngineManifest:
    """The manifest as that of a model of three layers, or of the first ones."""
    sizes = replace(manifest.bundle.sizes, num_layers=3)
    return replace(manifest, bundle=replace(manifest.bundle, sizes=sizes), layers=layers)


@pytest.fixture
def trio():
    first = FastEngine(three_layers(fast_manifest(**SHALLOW), 1), error=4.0)
    middle = FastEngine(three_layers(fast_manifest()), error=0.7)
    last = ToyEngine(three_layers(precise_manifest()))
    first.running = middle.running = last.running
    return first, middle, last


def test_three_engines_in_a_row_return_the_last_ones_hits(tmp_path, trio, alone):
    first, *behind = trio
    values = np.random.default_rng(0).permutation(600) / 4
    with (
        toy_store(tmp_path / "many", values) as many,
        Reranker(first, toy_tokenizer(tmp_path), many, rescore=behind) as reranker,
        Reranker(ToyEngine(precise_manifest()), toy_tokenizer(tmp_path), many) as exact,
    ):
        result = reranker.rank("red circle", top_k=5)
        assert result.hits == exact.rank("red circle", top_k=5).hits
    last, middle = result.rescoring, result.rescoring.before
    assert (last.engine.precision, middle.engine.precision) == ("fp32", "int8")
    assert result.engine.layers == "1 of 3"
    assert 5 <= last.num_rescored < middle.num_rescored < 600
    assert (middle.margin, middle.before) == (None, None)
    assert "times as deep" in middle.chosen
    assert "within" in last.chosen
    assert last.margin == pytest.approx(SAFETY * 2.0, abs=1e-5)


@pytest.mark.parametrize(
    ("recall", "num_images", "expected"),
    [(0.9, 60, 15), (0.99, 60, 24), (1.0, 60, 24), (0.9, 24, 6)],
)
def test_a_recall_keeps_the_share_that_held_it(tmp_path, trio, recall, num_images, expected):
    """Of 20 candidates each, the best was within 5 (8) of them, the best 2 within 6 (9)."""
    depths = {"1": {"0.9": 0.25, "0.99": 0.4, "1": 0.4}, "2": {"0.9": 0.3, "0.99": 0.45, "1": 0.45}}
    first, _, last = trio
    fidelity = {**SHALLOW["fidelity"], "depths": depths}
    first.manifest = replace(first.manifest, fidelity=fidelity)
    tokenizer = toy_tokenizer(tmp_path)
    with (
        toy_store(tmp_path / "some", np.arange(num_images)) as some,
        Reranker(first, tokenizer, some, rescore=last, recall=recall) as reranker,
    ):
        rescoring = reranker.rank("x", top_k=1).rescoring
        assert rescoring.num_rescored in (expected, expected + 1)  # one has no fast score
        assert f"recall of {recall:g}" in rescoring.chosen
        assert len(reranker.rank("x", top_k=20)) == 20


def test_a_recall_that_was_never_measured_is_refused(tmp_path, trio, store):
    first, _, last = trio
    with pytest.raises(EngineError, match="too few candidates"):
        Reranker(first, toy_tokenizer(tmp_path), store, rescore=last, recall=0.9)


@pytest.mark.parametrize("recall", [0, -1, 1.01, math.nan, "0.9", True])
def test_a_recall_that_is_no_share_is_refused(tmp_path, trio, store, recall):
    first, _, last = trio
    with pytest.raises(RequestError, match="recall"):
        Reranker(first, toy_tokenizer(tmp_path), store, rescore=last, recall=recall)


def test_margin_and_recall_exclude_each_other(tmp_path, trio, store):
    first, _, last = trio
    both = {"recall": 0.9, "rescore_margin": 1.0}
    with pytest.raises(RequestError, match="both choose survivors, give one"):
        Reranker(first, toy_tokenizer(tmp_path), store, rescore=last, **both)


def test_the_last_engine_must_be_whole(tmp_path, trio, store):
    first, middle, _ = trio
    with pytest.raises(EngineError, match="cannot rerank together") as caught:
        Reranker(middle, toy_tokenizer(tmp_path), store, rescore=first)
    assert "1 of 3 layers" in caught.value.faults[0]
