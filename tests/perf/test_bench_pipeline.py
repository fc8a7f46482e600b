"""The benchmark of the pipeline on a few small records: what is compared, judged and said."""

from __future__ import annotations

import json

import pytest

from edje.errors import EdjeError
from edje.perf import bench_pipeline as bench

SIZES = {"NUM_TOKENS": 2, "HIDDEN": 8, "NUM_RECORDS": 60, "NUM_PAIRS": 50, "MAX_PAIRS": 8}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setattr(bench, name, value)


def test_both_comparisons_are_timed_and_said(tmp_path):
    result = bench.measure(3, tmp_path)
    for part, rival in (("own_cost", bench.LOOP), ("gather", bench.READ)):
        assert {timing["name"] for timing in result[part]} == {bench.PIPELINE, rival}
        assert {timing["num_runs"] for timing in result[part]} == {3}
    json.dumps(result)
    assert f"costs {result['own_cost_us_per_batch']} us a batch" in bench.summary(result)


@pytest.mark.parametrize(
    ("cost_us", "share", "expected"),
    [
        (99.9, 0.8, []),
        (100.0, 0.79, ["a batch costs 100 us", "79% of the store's own"]),
        (20.0, 0.5, ["50% of the store's own speed, expected 80% or more"]),
    ],
)
def test_what_falls_short_is_named(cost_us, share, expected):
    faults = bench.faults_of(cost_us, share)
    assert len(faults) == len(expected)
    assert all(part in fault for part, fault in zip(expected, faults, strict=True))


def test_wrong_scores_end_the_comparison(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.OneValue, "read", lambda self, rows, out, *_, **__: out.fill(9) or [])
    with pytest.raises(EdjeError, match="pipeline gives wrong scores"):
        bench.measure(1, tmp_path)
