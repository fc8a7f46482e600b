"""The benchmark of the server: it measures a real one, and names what does not hold."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edje.perf import bench_serve
from edje.perf.serve_traffic import Known
from running_server import Running, running, settings_of

IDS = [f"img-{number}" for number in range(12)]


@pytest.fixture(scope="module")
def server(tiny_engine: Path, tiny_store: Path):
    with running(settings_of(tiny_engine, tiny_store)) as started:
        yield started


@pytest.fixture
def known(tiny_engine: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> Known:
    monkeypatch.setattr(bench_serve, "NUM_CANDIDATES", 10)
    monkeypatch.setattr(bench_serve, "NUM_CLIENTS", 4)
    return Known.of(tiny_engine, tiny_store, ["red", "a blue circle"])


def test_every_answer_of_a_load_is_compared(server: Running, known: Known):
    traffic = bench_serve.Traffic(known, server.port)
    outcome = asyncio.run(traffic.closed_loop(0.3))
    assert len(outcome.latencies[200]) > 4
    assert (outcome.num_wrong, outcome.num_hung) == (0, 0)
    off = Known(known.ids, {query: -scores for query, scores in known.scores.items()})
    assert asyncio.run(bench_serve.Traffic(off, server.port).closed_loop(0.2)).num_wrong > 0


def test_an_open_loop_sends_at_the_rate_that_was_asked_for(server: Running, known: Known):
    outcome = asyncio.run(bench_serve.Traffic(known, server.port).open_loop(50, 1.0))
    assert 20 < sum(map(len, outcome.latencies.values())) < 100
    assert outcome.figures(200)["p50_ms"] > 0


def result(**changed):
    load = {
        "of_capacity": 0.95,
        "hung": 0,
        "wrong": 0,
        "accepted": {"p99_ms": 900.0},
        "refused": {"number": 5, "p99_ms": 3.0},
    }
    return {
        "conditions": {"cpu": "a", "cores": 2, "load_average": [0, 0, 0], "commit": "c"},
        "capacity": {"served_pairs_per_s": 95.0, "direct_pairs_per_s": 100.0, "share": 0.95},
        "loads": {"0.5": {**load, "of_capacity": 0.5}, "10": load},
        "fairness": {"batches_waited": [1, 2, 1], "batches_of_5000": 20},
        "front": {"100": {"cpu_us": 140.0, "cpu_us_alone": 300.0, "pairs_per_cpu_s": 700_000}},
        **changed,
    }


def test_what_holds_names_no_fault():
    assert bench_serve.faults_of(result()) == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"capacity": {"share": 0.7}}, "70% of rank"),
        ({"front": {"100": {"cpu_us": 160.0}}}, "the front takes 160 us at 100"),
        ({"fairness": {"batches_waited": [4, 5, 3]}}, "waited [4, 5, 3] batches"),
    ],
)
def test_what_does_not_hold_is_named(changed, fault):
    (found,) = bench_serve.faults_of(result(**changed))
    assert fault in found


def test_a_load_that_hangs_starves_or_refuses_slowly_is_named():
    bad = result()
    bad["loads"]["10"].update(hung=1, of_capacity=0.5, refused={"number": 1, "p99_ms": 80.0})
    assert len(bench_serve.faults_of(bad)) == 3
