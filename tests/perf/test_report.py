"""The one form of all results: what pytest-benchmark's readers expect, and what we add."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edje.perf.harness import Times, Timing, timings_json
from edje.perf.report import (
    Measured,
    benchmark_json,
    entries,
    fingerprint,
    folded,
    stats,
    summary,
)

SECONDS = [0.2, 0.1, 0.4, 0.3, 9.0]


def test_statistics_are_those_of_pytest_benchmark():
    """Compared with the library itself, on the same runs."""
    from pytest_benchmark.stats import Stats

    theirs = Stats()
    for one in SECONDS:
        theirs.update(one)
    found = stats(SECONDS)
    expected = theirs.as_dict()
    for name in ("min", "max", "mean", "stddev", "rounds", "median", "total", "ops"):
        assert found[name] == pytest.approx(expected[name]), name
    assert found["outliers"] == expected["outliers"]
    assert expected.keys() - {"data"} <= found.keys()


def test_an_entry_has_speed_from_the_least_time_and_percentiles_of_all():
    one = Measured("rank", "stages", SECONDS, pairs=50, params={"candidates": 50})
    entry = one.to_json()
    assert entry["fullname"] == "stages::rank[candidates=50]"
    extra = entry["extra_info"]
    assert (extra["pairs_per_s"], extra["us_per_pair"]) == (500.0, 2000.0)
    assert extra["p50_ms"] == 300.0
    assert extra["p99_ms"] == pytest.approx(np.percentile(SECONDS, 99) * 1e3)
    assert Measured("copy", "roof", [0.5]).pairs_per_s is None
    several = Measured("serve", "load", SECONDS, pairs=50, elapsed_s=2.0)
    assert several.pairs_per_s == 125.0


def test_a_result_has_the_top_level_of_pytest_benchmark_and_shared_conditions():
    own = Measured("a", "g", [1.0], pairs=1, conditions={"batch": 2, "engine": "other"})
    result = benchmark_json([own], conditions={"engine": "int8", "threads": "all"}, roof={"x": 1})
    expected = {"machine_info", "commit_info", "benchmarks", "datetime", "version", "roof"}
    assert result.keys() == expected
    [entry] = entries(result, "g")
    where = {"engine": "other", "threads": "all", "batch": 2}
    assert entry["extra_info"]["conditions"] == where
    assert entries(result, "g", batch=1) == []
    json.dumps(result)
    assert f"{result['machine_info']['cpu']['count']} cores" in summary(result)
    print_of = fingerprint(result["machine_info"])
    assert print_of["gpu"] is None or print_of["gpu"][0]
    other = {**result["machine_info"], "gpu": {"name": "NVIDIA H200", "driver": "580"}}
    assert fingerprint(other) != print_of


def test_an_older_benchmark_becomes_entries_and_keeps_its_figures():
    timing = Timing.of("int8", 8, Times([4.0, 2.0], [5.0, 3.0]))
    result = {
        "conditions": {"cpu": "x", "candidates": 8},
        "batch_8": {"timings": timings_json({"int8": timing}), "ratio": 2.0},
        "faults": ["slow"],
    }
    whole = folded("precisions", result)
    [entry] = whole["benchmarks"]
    assert (entry["group"], entry["name"]) == ("precisions/batch_8", "int8")
    assert entry["stats"]["min"] == 0.002
    assert entry["extra_info"]["pairs_per_s"] == 4000.0
    assert entry["extra_info"]["min_cpu_ms"] == 3.0
    assert entry["extra_info"]["conditions"] == {"candidates": 8}
    kept = whole["result"]["batch_8"]
    assert kept["ratio"] == 2.0
    assert kept["timings"] == [timing.facts()]
    assert whole["faults"] == ["slow"]
