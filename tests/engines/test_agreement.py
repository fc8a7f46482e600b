"""How two lists of scores agree, by definitions of the field and by their properties."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edje.engines.agreement import kendall_tau, rank_agreement, top_agreement

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


@unhurried
@given(st.lists(small, min_size=2, max_size=12))
def test_a_ranking_agrees_with_itself(scores):
    table = np.array(scores, np.float32)
    assert kendall_tau(table, table) == pytest.approx(1.0)
    assert top_agreement(table, table, 10) == 1.0


def test_a_reversed_ranking():
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
