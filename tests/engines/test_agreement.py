"""How two lists of scores agree, by definitions of the field and by their properties."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edje.engines.agreement import (
    SAFETY,
    depth_shares,
    error_levels,
    kendall_tau,
    rank_agreement,
    recall,
    top_agreement,
)

small = st.integers(-5, 5)
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def slow_tau_b(first, second):
    """Kendall's tau-b by its definition."""
    concordant = discordant = ties_first = ties_second = 0
    for i, j in itertools.combinations(range(len(first)), 2):
        product = (first[i] - first[j]) * (second[i] - second[j])
        concordant += product > 0
        discordant += product < 0
        ties_first += first[i] == first[j]
        ties_second += second[i] == second[j]
    pairs = len(first) * (len(first) - 1) / 2
    scale = ((pairs - ties_first) * (pairs - ties_second)) ** 0.5
    return (concordant - discordant) / scale if scale else None


@unhurried
@given(st.lists(st.tuples(small, small), min_size=2, max_size=12))
def test_tau_is_what_its_definition_says(pairs):
    first, second = zip(*pairs, strict=True)
    expected = slow_tau_b(first, second)
    tau = kendall_tau(np.array(first, float), np.array(second, float))
    if expected is not None:
        assert tau == pytest.approx(expected)


def test_a_ranking_agrees_with_itself_and_not_with_its_reverse():
    scores = np.array([*range(20), 3, 3], np.float32)
    assert kendall_tau(scores, scores) == pytest.approx(1.0)
    assert top_agreement(scores, scores, 10) == 1.0
    scores = np.arange(20.0)
    assert kendall_tau(scores, -scores) == pytest.approx(-1.0)
    assert top_agreement(scores, -scores, 10) == 0.0
    assert top_agreement(scores, -scores, 20) == 1.0


def test_a_known_difference_over_queries_of_different_length():
    expected = [np.array([3.0, 2.0, 1.0, 0.5]), np.array([0.0, 1.0, 2.0])]
    found = [expected[0], expected[1] + np.array([2.5, 0.0, 0.0])]
    agreement = rank_agreement(expected, found)
    assert (agreement.num_queries, agreement.num_pairs) == (2, 7)
    assert agreement.max_abs_diff == agreement.p99_abs_diff == agreement.p999_abs_diff == 2.5
    assert agreement.mean_abs_diff == pytest.approx(2.5 / 7)
    assert agreement.max_underrating == 0.0
    assert rank_agreement(found, expected).max_underrating == 2.5
    assert agreement.top_1 == 0.5
    assert agreement.top_10 == 1.0
    assert agreement.kendall_tau == pytest.approx((1.0 + (1 - 2) / 3) / 2)


def test_a_long_list_of_candidates_takes_no_time():
    random = np.random.default_rng(0)
    first = random.standard_normal(50_000)
    second = first + 1e-3 * random.standard_normal(50_000)
    assert 0.999 < kendall_tau(first, second) < 1.0
    assert kendall_tau(np.round(first, 2), np.round(first, 2)) == pytest.approx(1.0)


@unhurried
@given(st.lists(st.tuples(small, small), min_size=1, max_size=30), st.data())
def test_recall_is_the_place_in_the_stable_ranking(pairs, data):
    scores = np.array([score for score, _ in pairs], np.float32)
    target = data.draw(st.integers(0, len(scores) - 1))
    rank = np.argsort(-scores, kind="stable").tolist().index(target)
    found = recall([scores, scores], [target, None])
    assert found == {f"R@{k}": float(rank < k) for k in (1, 5, 10)}
    assert recall([scores], [None]) is None


def test_scores_that_are_not_finite_rank_last_and_the_underrating_is_signed():
    agreement = rank_agreement([np.array([3.0, 2.0, 1.0])], [np.array([np.nan, 2.0, 1.0])])
    assert agreement.max_abs_diff == np.inf
    assert agreement.top_1 == 0.0
    assert agreement.kendall_tau == pytest.approx(-1 / 3)
    expected = [np.array([1.0, 2.0])]
    assert rank_agreement(expected, [expected[0] - [0.5, 0.25]]).max_underrating == 0.5
    assert rank_agreement(expected, [expected[0] + [0.5, 0.25]]).max_underrating == -0.25


def test_lists_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="scores of one query"):
        rank_agreement([np.zeros(3)], [np.zeros(2)])
    with pytest.raises(ValueError, match="shorter"):
        rank_agreement([np.zeros(3)], [])


def test_scores_may_come_from_any_iterable():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 5, 12)).astype(np.float32)
    assert rank_agreement(iter(first), map(np.copy, second)) == rank_agreement(first, second)
    assert recall(iter(first), iter([0] * 5)) == recall(first, [0] * 5)


def test_how_deep_the_best_stand_by_hand():
    expected = [np.arange(20.0), np.arange(20.0)]
    last_is_third = np.arange(20.0)
    last_is_third[19] = 16.5  # behind 18 and 17
    shares = depth_shares(expected, [expected[0], last_is_third])
    assert set(shares) == {"1", "2", "5", "10"}
    assert shares["1"] == {"0.9": 0.15, "0.95": 0.15, "0.99": 0.15, "1": 0.15}
    assert shares["10"]["1"] == 0.5
    assert depth_shares([np.array([1.0])], [np.array([1.0])]) == {}


@unhurried
@given(st.lists(st.tuples(small, small), min_size=2, max_size=40))
def test_so_deep_all_of_the_best_are_found_and_no_less_deep(pairs):
    expected, scores = np.array(pairs, float).T
    for k, recalls in depth_shares([expected], [scores]).items():
        best = set(np.argsort(-expected, kind="stable")[: int(k)].tolist())
        order = np.argsort(-scores, kind="stable").tolist()
        deep = round(recalls["1"] * len(scores))
        assert best <= set(order[:deep])
        assert not best <= set(order[: deep - 1])
        assert recalls["0.9"] <= recalls["1"]


def test_what_must_be_looked_at_again_by_hand():
    expected = np.arange(20.0)
    assert rank_agreement([expected], [expected - 0.0]).rescored == 0
    overrated = rank_agreement([expected], [expected + 3])
    assert overrated.rescored == pytest.approx(3 / 18)  # what now reaches the second best, 18
    low = expected.copy()
    low[5] -= 4  # SAFETY * 4 = 6: from the second best, 18, down to 12
    assert SAFETY == 1.5
    assert rank_agreement([expected], [low]).rescored == pytest.approx(6 / 18)


@unhurried
@given(st.lists(st.tuples(small, small), min_size=1, max_size=40))
def test_up_to_each_level_no_pair_errs_more_than_its_share(pairs):
    expected, scores = np.array(pairs, float).T
    levels = error_levels([expected], [scores])
    assert levels == sorted(levels)
    assert levels[-1] == [scores.max(), 1.0]
    below = expected - scores
    for up_to, share in levels:
        low = below[scores <= up_to]
        assert np.abs(low).max() <= share * np.abs(below).max() + 1e-9
        assert low.max() <= share * max(below.max(), 0.0) + 1e-9


def test_levels_of_a_scorer_that_errs_little_on_low_scores_by_hand():
    expected = np.arange(16.0)
    errors = np.where(expected < 8, 0.125, 0.5)
    levels = error_levels([expected], [expected - errors])
    assert [share for _, share in levels] == [0.25] * 4 + [1.0] * 4
    assert [up_to for up_to, _ in levels[:2]] == [0.875, 2.875]
    assert {share for _, share in error_levels([expected], [expected])} == {1.0}
