"""Stages in turns: how many turns each gets, what is checked, and what a sweep gives."""

from __future__ import annotations

import json

import pytest

from edje.engines.manifest import Profile
from edje.errors import EdjeError
from edje.perf import measure
from edje.perf.free_engine import write_free_engine
from edje.perf.measure import measure_stages, print_result, run_stages, run_sweep
from edje.perf.stage import Stage


@pytest.fixture
def clock(monkeypatch):
    """A clock that only stages move."""

    class Clock:
        now, log = 0.0, ""

        def stage(self, name, seconds, **more):
            def run():
                self.log += name
                self.now += seconds

            given = {"check": lambda: None, **more}
            return Stage(name, run, 10, **given)

    clock = Clock()
    monkeypatch.setattr(measure, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(measure, "process_time", lambda: 2 * clock.now)
    return clock


def test_a_slow_stage_gets_fewer_turns_spread_over_the_same_time(clock):
    stages = {"f": clock.stage("f", 0.1), "s": clock.stage("s", 0.5)}
    fast, slow = measure_stages(stages, seconds=1.0, least_rounds=1)
    assert (len(fast.seconds), len(slow.seconds)) == (10, 2)
    assert clock.log == "fs" + "fffffffff" + "s"
    assert fast.seconds == pytest.approx([0.1] * 10)
    assert fast.cpu_seconds == pytest.approx([0.2] * 10)
    assert fast.pairs_per_s == pytest.approx(100.0)


def test_a_long_stage_gets_its_least_rounds_and_work_becomes_a_rate(clock):
    long = clock.stage("l", 100.0, group="roof", work={"flops_per_s": 500.0})
    [found] = measure_stages({"l": long}, seconds=1.0)
    assert len(found.seconds) == measure.LEAST_ROUNDS
    assert found.rates == {"flops_per_s": 5.0}


def test_a_wrong_result_at_the_end_ends_the_measurement(clock):
    def check():
        raise EdjeError("other scores")

    with pytest.raises(EdjeError, match="other scores"):
        measure_stages({"f": clock.stage("f", 0.1, check=check)}, seconds=1.0)


@pytest.fixture
def free_engine(tiny_bundle, tmp_path):
    return write_free_engine(tiny_bundle, tmp_path / "free", Profile(16, (16, 32, 64)))


def test_a_run_gives_shares_conditions_and_a_table(tiny_engine, capsys, small_roof):
    given = {"candidates": 12, "wordpieces": 3, "only": ["read", "rank"]}
    result = json.loads(json.dumps(run_stages(tiny_engine, seconds=0.01, **given)))
    found = {one["name"]: one["extra_info"] for one in result["benchmarks"]}
    assert {"read", "rank", "memcpy", "fp32 openvino"} <= found.keys()
    assert found["rank"]["share_of_roof"] > 0
    assert found["read"]["share_of_roof"] > 0
    where = found["rank"]["conditions"]
    expected = {"engine": "openvino fp32", "candidates": 12, "wordpieces": 3, "threads": "all"}
    assert expected.items() <= where.items()
    print_result(result)
    shown = capsys.readouterr().out
    assert "rank" in shown
    assert "roof: memcpy" in shown


def test_a_sweep_has_an_entry_for_every_value(free_engine):
    given = {"seconds": 0.01, "roof": False, "only": ["resolve", "rank"], "wordpieces": 3}
    result = run_sweep(free_engine, "candidates", [5, 20], **given)
    names = [one["fullname"] for one in result["benchmarks"]]
    assert names == [
        f"stages::{name}[candidates={value}]" for value in (5, 20) for name in ("resolve", "rank")
    ]
    assert [one["extra_info"]["pairs"] for one in result["benchmarks"]] == [5, 5, 20, 20]
    assert result["swept"] == "candidates"


def test_what_cannot_be_swept_is_said(free_engine):
    with pytest.raises(EdjeError, match="cannot sweep over 'colour', expected one of candidates"):
        run_sweep(free_engine, "colour", [1], seconds=1.0)
