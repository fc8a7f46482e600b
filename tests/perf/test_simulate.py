"""The simulation against what queueing theory and arithmetic say."""

from __future__ import annotations

import numpy as np
import pytest

from edje.perf.costs import Cost, StageCosts
from edje.perf.simulate import Server, poisson_arrivals, request_s

NONE = Cost()


def costs_of(**given):
    return StageCosts(**{name: given.get(name, NONE) for name in StageCosts._fields})


def test_stages_of_one_request_overlap():
    costs = costs_of(read=Cost(1.0), upload=Cost(0.5), compute=Cost(2.0), download=Cost(0.25))
    assert request_s(costs, 1, 1) == pytest.approx(3.75)
    assert request_s(costs, 4, 1) == pytest.approx(1.0 + 0.5 + 4 * 2.0 + 0.25)


def test_the_slowest_stage_sets_the_pace():
    costs = costs_of(read=Cost(per_pair_s=3e-6), compute=Cost(per_pair_s=2e-6))
    seconds = request_s(costs, 100_000, 1000)
    assert seconds == pytest.approx(0.3, rel=0.02)


def test_one_slot_lets_nothing_overlap():
    costs = costs_of(read=Cost(1.0), compute=Cost(1.0))
    assert request_s(costs, 5, 1, num_slots=1) == pytest.approx(10.0)
    assert request_s(costs, 5, 1, num_slots=2) == pytest.approx(6.0)


def test_waiting_is_that_of_one_stage_of_fixed_service_time():
    """M/D/1: mean wait s r / (2 (1 - r)); one pair a batch, for larger ones are mixed."""
    service, load = 0.01, 0.6
    costs = costs_of(compute=Cost(service))
    arrivals = poisson_arrivals(load / service, 40_000)
    found = Server(costs, 1).run(arrivals, 1)
    expected = service + service * load / (2 * (1 - load))
    assert found.latencies_s.mean() == pytest.approx(expected, rel=0.05)
    assert found.utilisation["compute"] == pytest.approx(load, rel=0.03)


def test_small_requests_share_batches_under_load_and_so_exceed_the_speed_of_one_at_a_time():
    costs = costs_of(compute=Cost(0.010, 1e-5))  # alone: 11 ms for 100 pairs, 90 requests/s
    found = Server(costs, 1000).run(poisson_arrivals(300.0, 5000), 100)
    assert len(found.latencies_s) == 5000
    assert found.pairs_per_s == pytest.approx(30_000, rel=0.05)
    assert found.mean_batch > 200


def test_overload_is_refused_and_what_is_accepted_waits_as_long_as_allowed():
    costs = costs_of(compute=Cost(per_pair_s=1e-4))  # 100 requests/s of 100
    found = Server(costs, 200, max_wait_s=0.5).run(poisson_arrivals(300.0, 6000), 100)
    assert found.num_refused == pytest.approx(4000, rel=0.05)
    assert found.percentile_ms(99) < 600
    assert found.pairs_per_s == pytest.approx(10_000, rel=0.05)


def test_deadlines_drop_what_waits_too_long():
    costs = costs_of(compute=Cost(per_pair_s=1e-4))
    found = Server(costs, 200, timeout_s=0.2).run(poisson_arrivals(300.0, 3000), 100)
    assert found.num_late > 1000
    assert len(found.latencies_s) + found.num_late == 3000


def test_every_request_is_answered_refused_or_late_and_time_is_kept():
    arrivals = poisson_arrivals(50.0, 500, seed=3)
    assert (np.diff(arrivals) > 0).all()
    found = Server(costs_of(compute=Cost(0.001), read=Cost(0.002)), 100).run(arrivals, 30)
    assert len(found.latencies_s) == 500
    assert found.latencies_s.min() >= 0.003 - 1e-9
