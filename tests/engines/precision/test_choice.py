"""Which scales the search takes where a backend offers several: what costs least and holds."""

import numpy as np
import pytest

from edje.engines.agreement import rank_agreement
from edje.engines.fidelity import FidelityLimits
from edje.engines.precision.emulate import scorer
from edje.engines.precision.search import choose
from edje.engines.precision.trials import CalibrationPairs, spread_over
from edje.engines.samples import RandomSamples, sample_batches
from edje.engines.scales import Scales

from .conftest import PROFILE, with_outliers

STATIC = Scales("static", 0.3)
WIDE, NARROW = Scales("dynamic", 0.45, 32), Scales("dynamic", 0.6, 16)
ALL = (STATIC, WIDE, NARROW)


def search(graph, queries, tau, scales=ALL, told=lambda _: None):
    limits = FidelityLimits(min_kendall_tau=tau)
    return choose(graph, queries, "int8", "float32", limits, told, scales=scales)


def agreement(choice, graph, queries):
    """Score everything again, by the graph that was chosen."""
    scores = [
        [np.concatenate([score(batch) for batch in query]) for query in queries]
        for score in (scorer(graph), scorer(choice.graph))
    ]
    return rank_agreement(*scores)


@pytest.fixture(scope="module")
def many(bundle):
    """More queries than the search compares by."""
    sep = bundle.text.sep_id
    samples = RandomSamples(bundle, 20, 40)
    return [list(sample_batches(s, PROFILE, pad_id=0, sep_id=sep)) for s in samples]


def test_static_scales_that_hold_are_taken_and_nothing_else_is_tried(graph, queries):
    choice = search(graph, queries, -1.0)
    assert choice.scales == STATIC
    assert {tried["scales"] for tried in choice.facts["tried"]} == {"static"}
    assert choice.facts["cost"] == STATIC.cost
    assert (
        "dynamic, 32 columns, everything quantised: would cost 0.45, not needed"
        in (choice.facts["chosen"])
    )


def test_dynamic_scales_are_taken_where_static_ones_would_keep_more_than_they_save(graph, queries):
    planted, wide = with_outliers(graph), Scales("dynamic", 0.4, 32)
    free = {
        scales: search(planted, queries, -1.0, (scales,)).agreement.kendall_tau
        for scales in (STATIC, wide)
    }
    assert free[STATIC] < free[wide]
    choice = search(planted, queries, free[wide], (STATIC, wide, NARROW))
    assert choice.scales == wide
    assert choice.kept == ()
    assert choice.facts["cost"] == wide.cost
    assert "static, everything quantised: would cost 0.30, breaks them" in choice.facts["chosen"]
    static = [tried for tried in choice.facts["tried"] if tried["scales"] == "static"]
    assert all(tried["cost"] < wide.cost for tried in static), "further is dearer"
    assert not any(tried["scales"].endswith("16 columns") for tried in choice.facts["tried"])


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_what_is_taken_holds_the_limit_on_all_pairs_and_costs_least_of_what_was_tried(
    graph, many, share
):
    planted = with_outliers(graph)
    free = search(planted, many, -1.0, (NARROW,)).agreement.kendall_tau
    limit = free + share * (1 - free)
    choice = search(planted, many, limit)
    found = agreement(choice, planted, many)
    assert found.kendall_tau >= limit
    assert np.isclose(found.kendall_tau, choice.agreement.kendall_tau, atol=1e-9)
    num_pairs = found.num_pairs
    held = [
        tried
        for tried in choice.facts["tried"]
        if tried["num_pairs"] == num_pairs and tried["kendall_tau"] >= limit
    ]
    assert choice.facts["cost"] == min(tried["cost"] for tried in held)
    compared = {tried["num_pairs"] for tried in choice.facts["tried"]}
    assert min(compared) < num_pairs, "ways are compared on some queries"


def test_progress_says_what_runs_and_the_time_left(graph, many):
    told: list[str] = []
    search(with_outliers(graph), many, 0.97, told=told.append)
    assert told[0] == "scoring 800 calibration pairs in float32"
    assert all("left at most)" in line for line in told[1:4])
    assert any("keeping 1 of 8 layer groups" in line for line in told)


def test_pairs_are_scored_once_in_float32_and_compared_by_whole_queries(graph, many):
    pairs = CalibrationPairs(graph, many, lambda _: None)
    assert pairs.every == list(range(20))
    assert 8 <= len(pairs.some) < 20
    assert pairs.agreement(scorer(graph), pairs.some).max_abs_diff == 0
    assert sum(map(len, pairs.few())) <= 40


def test_queries_are_spread_evenly():
    assert spread_over([10] * 40, 100, 8) == list(range(0, 40, 4))
    assert spread_over([1000] * 40, 100, 8) == list(range(0, 40, 5))
    assert spread_over([10] * 3, 100, 8) == [0, 1, 2]
