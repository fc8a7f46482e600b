"""The gate's decisions, on ratios whose truth is known."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.perf.gate_statistics import (
    MAX_LAUNCHES,
    MIN_LAUNCHES,
    decide,
    estimate,
    least,
    student_quantile,
)

LIMIT = 0.05
RATIOS = st.lists(st.floats(0.5, 2.0), min_size=1, max_size=12)


def launch_ratio(chance, truth, spread, busy):
    """Return the ratio of one launch: a floor, delays by others, a bad place now and then.

    `spread`: of a process's floor; `busy`: mean delay of a run, as a share of its time.
    """
    sides = []
    for time in (1.0, truth):
        floor = time * math.exp(chance.gauss(0, spread / math.sqrt(2)))
        if chance.random() < 0.05:
            floor *= 1.05
        sides.append(least([floor * (1 + chance.expovariate(1 / busy)) for _ in range(160)]))
    return sides[1] / sides[0]


def gate(chance, truth, spread, busy):
    """Return whether a stage fails: slower, and slower again."""
    for _ in range(2):
        ratios = []
        while (decision := decide(ratios, LIMIT)) == "open":
            ratios.append(launch_ratio(chance, truth, spread, busy))
        if decision == "fine":
            return False
    return True


@pytest.mark.parametrize("spread", [0.003, 0.01, 0.027])
@pytest.mark.parametrize("busy", [0.05, 0.5])
def test_ten_per_cent_are_caught_and_nothing_passes(spread, busy):
    chance = random.Random(f"{spread} {busy}")
    assert sum(gate(chance, 1.0, spread, busy) for _ in range(60)) == 0
    assert sum(gate(chance, 1.1, spread, busy) for _ in range(60)) == 60


def test_clear_cases_are_decided_soon_and_close_ones_late():
    assert decide([1.0] * (MIN_LAUNCHES - 1), LIMIT) == "open"
    assert decide([1.0] * MIN_LAUNCHES, LIMIT) == "fine"
    assert decide([1.1] * MIN_LAUNCHES, LIMIT) == "slower"
    assert decide([0.8] * MIN_LAUNCHES, LIMIT) == "fine"
    noisy = [1.0, 1.12, 0.98, 1.15, 1.02, 1.1, 0.97, 1.13, 1.01, 1.11]
    assert decide(noisy[:5], LIMIT) == "open"
    assert decide([1.051] * MAX_LAUNCHES, LIMIT) == "slower"  # who cannot tell takes the likelier
    assert decide([1.049] * MAX_LAUNCHES, LIMIT) == "fine"
    assert decide([1.049] * 4, LIMIT, max_launches=4) == "fine"


def test_a_launch_that_lies_far_off_moves_little():
    calm = estimate([1.0, 1.01, 0.99, 1.0, 1.0, 1.0])
    upset = estimate([1.0, 1.01, 0.99, 1.0, 1.0, 1.3])
    assert abs(upset.ratio - calm.ratio) < 0.003
    assert upset.sees(LIMIT) < 0.1


@given(RATIOS)
def test_an_estimate_lies_in_its_interval_and_knows_no_order(ratios):
    found = estimate(ratios)
    assert min(ratios) * 0.999 <= found.ratio <= max(ratios) * 1.001
    assert found.low < found.ratio < found.high
    assert found.num_launches == len(ratios)
    assert found == estimate(ratios[::-1])
    inverse = estimate([1 / ratio for ratio in ratios])
    assert inverse.ratio == pytest.approx(1 / found.ratio)
    assert inverse.high == pytest.approx(1 / found.low)


@given(RATIOS.filter(lambda ratios: len(ratios) >= MIN_LAUNCHES), st.floats(0.01, 1.0))
def test_a_decision_agrees_with_the_interval(ratios, limit):
    found, decision = estimate(ratios), decide(ratios, limit)
    if len(ratios) < MAX_LAUNCHES:
        assert (decision == "slower") == (found.low > 1 + limit)
        assert (decision == "fine") == (found.high < 1 + limit)
    assert decide(ratios, limit, max_launches=1) != "open"
    surely_seen = estimate([1 + found.sees(limit)]).ratio
    assert surely_seen >= 1 + limit


@pytest.mark.parametrize(
    ("freedom", "expected"), [(4, 4.604), (5, 4.032), (6, 3.707), (8, 3.355), (13, 3.012)]
)
def test_students_quantile(freedom, expected):
    assert student_quantile(0.995, freedom) == pytest.approx(expected, rel=0.015)


def test_the_least_time_is_no_freak():
    assert least([5.0, 3.0, 4.0]) == 3.0
    assert least([0.1, *[1.0 + at / 1000 for at in range(199)]]) == pytest.approx(1.001)


@pytest.mark.parametrize("ratios", [[], [0.0], [1.0, math.nan], [math.inf], [-1.0]])
def test_ratios_that_are_none(ratios):
    with pytest.raises(ValueError, match="expected positive numbers"):
        estimate(ratios)
