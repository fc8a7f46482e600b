"""Survivors chosen by depth and by share; by margin they are tested with the cascade."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.engines.agreement import LOOKS_AGAIN
from edje.runtime.survivors import LEAST, Rule
from oracle import Oracle

scores = st.lists(
    st.one_of(st.floats(-9, 9, width=16), st.sampled_from([math.nan, math.inf])),
    min_size=1,
    max_size=60,
)


def best(values, k):
    order = np.argsort(-values, kind="stable")
    return [i for i in order.tolist() if np.isfinite(values[i])][:k]


def test_a_good_order_is_searched_a_little_deeper_than_the_best():
    precise = np.linspace(5, -5, 2000, dtype=np.float32)
    found = Oracle(precise).rescore(np.exp(precise), top_k=10, rule=Rule())
    assert best(found.scores, 10) == list(range(10))
    assert np.count_nonzero(found.rescored) == 10 + LEAST
    assert (found.margin, found.num_widened) == (None, 0)


def test_what_turns_up_late_makes_the_search_go_as_deep_again():
    fast = -np.arange(2000, dtype=np.float32)
    precise = fast.copy()
    precise[90], precise[250] = 1.0, 2.0
    found = Oracle(precise).rescore(fast, top_k=10, rule=Rule())
    assert best(found.scores, 2) == [250, 90]
    assert np.count_nonzero(found.rescored) == LOOKS_AGAIN * 251


def test_fast_scores_of_any_scale_do():
    random = np.random.default_rng(0)
    precise = random.standard_normal(500).astype(np.float32)
    fast = (1e-3 * precise - 7).astype(np.float32)
    for rule in (Rule(), Rule(share=0.05)):
        found = Oracle(precise).rescore(fast, top_k=5, rule=rule)
        assert best(found.scores, 5) == best(precise, 5)


@settings(max_examples=200, deadline=None)
@given(scores, st.integers(1, 20), st.floats(0, 1), st.booleans())
def test_what_is_scored_is_the_head_of_the_fast_order(fast, top_k, share, by_share):
    fast = np.array(fast, np.float32)
    oracle = Oracle(np.arange(len(fast)))
    rule = Rule(share=share) if by_share else Rule()
    found = oracle.rescore(fast, top_k=top_k, rule=rule)
    ranked = np.where(np.isfinite(fast), fast, np.inf)
    order = np.argsort(-ranked, kind="stable")
    count = int(np.count_nonzero(found.rescored))
    assert set(order[:count].tolist()) == set(np.flatnonzero(found.rescored).tolist())
    assert np.isfinite(fast[~found.rescored]).all()  # what has no fast score is scored
    num_ranked = int(np.count_nonzero(np.isfinite(fast)))
    wanted = max(top_k, math.ceil(share * num_ranked)) if by_share else top_k
    assert count >= min(len(fast), len(fast) - num_ranked + min(wanted, num_ranked))
    if by_share:
        assert len(oracle.rounds) == 1


def test_slack_counts_what_may_be_among_the_best_of_a_finer_score():
    fast = -np.arange(3000, dtype=np.float32)
    precise = fast.copy()
    precise[400] = fast[9] - 0.5  # just outside of the ten best
    assert not Oracle(precise).rescore(fast, top_k=10, rule=Rule()).rescored[400]
    wide = Rule(margin=0.1, slack=500.0)
    assert Oracle(precise).rescore(fast, top_k=10, rule=wide).rescored[400]


@pytest.mark.parametrize("rule", [Rule(), Rule(share=0.5), Rule(margin=0.0)])
def test_precise_scores_that_are_missing_are_never_among_the_best(rule):
    fast = np.arange(300, dtype=np.float32)
    precise = fast.copy()
    precise[-3:] = np.nan
    found = Oracle(precise).rescore(fast, top_k=4, rule=rule)
    assert best(found.scores, 4) == [296, 295, 294, 293]
