"""The benchmark of what can be fed: right scores in every way, and a prediction that can fail."""

from __future__ import annotations

import json

import pytest

from edje.errors import EdjeError
from edje.perf import bench_feed
from edje.perf.harness import write_result
from edje.runtime.store.unlocked import is_built


@pytest.fixture
def few(monkeypatch):
    """Small batches and few rounds: what is measured is meaningless then, not what is checked."""
    monkeypatch.setattr(bench_feed, "NUM_PAIRS", 96)
    monkeypatch.setattr(bench_feed, "BATCHES", (32,))
    monkeypatch.setattr(bench_feed, "NUM_ROUNDS", 1)
    monkeypatch.setattr(bench_feed, "NUM_LOCK_ROUNDS", 3)


def test_every_way_is_fed_and_said_with_what_the_lock_allows(few, tmp_path):
    result = bench_feed.measure(2, tmp_path, num_records=128)
    names = {row["name"] for row in result["feeds"]}
    ways = ["host", "disk in Python", *["disk"] * is_built()]
    assert names == {f"{way}, batches of 32" for way in ways}
    assert all(each["locked_us"] > 0 < each["unlocked_us"] for each in result["lock"].values())
    assert {row["threads"] for row in result["threads"]} >= {1}
    text = bench_feed.summary(result)
    assert "with Python's lock" in text
    assert "16 cores" in text
    assert json.loads(write_result("feed", result, tmp_path).read_text()) == result


def test_wrong_records_are_no_figure(few, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_feed.FreeEngine, "_infer", lambda self, batch, scores: None)
    with pytest.raises(EdjeError, match="what was fed is not what is stored"):
        bench_feed.measure(1, tmp_path, num_records=128)


@pytest.mark.parametrize(
    ("num_threads", "expected"),
    [(1, 250_000), (2, 500_000), (4, 1_000_000), (16, 1_000_000)],
)
def test_threads_add_up_until_the_lock_is_always_taken(num_threads, expected):
    found = bench_feed.most_reads(num_threads, locked_us=1.0, unlocked_us=3.0)
    assert found == pytest.approx(expected)
