"""The frame of every benchmark: turns, minima, conditions, and how a command ends."""

import json
import subprocess
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest

from edje.errors import EdjeError
from edje.perf import harness
from edje.perf.harness import conditions, interleave, run_benchmark, speedup, timings_json


@pytest.fixture
def clock(monkeypatch):
    """A clock that only contestants move, so that times are exact."""

    class Clock:
        now, log = 0.0, ""

        def runs(self, name, *seconds):
            """Return a contestant that takes so many seconds, run by run."""
            left = iter(seconds)

            def run():
                self.log += name
                self.now += next(left)

            return run

    clock = Clock()
    monkeypatch.setattr(harness, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(harness, "process_time", lambda: 2 * clock.now)
    return clock


def test_minima_medians_and_ratio(clock):
    contestants = {"fast": clock.runs("f", 3.0, 1.0, 2.0), "slow": clock.runs("s", 4.0, 9.0, 5.0)}
    timings = interleave(contestants, pairs=8, num_rounds=3)
    fast, slow = timings["fast"], timings["slow"]
    assert (fast.min_ms, fast.median_ms, fast.min_cpu_ms) == (1000.0, 2000.0, 2000.0)
    assert (slow.min_ms, slow.median_ms) == (4000.0, 5000.0)
    assert (fast.pairs_per_s, slow.pairs_per_s) == (8.0, 2.0)
    assert speedup(fast, slow) == 4.0
    assert fast.num_runs == 3
    text = harness.timings_table(timings_json(timings))
    assert "fast" in text
    assert "8.0" in text


def test_everybody_runs_once_a_round_and_starts_in_turn(clock):
    interleave({name: clock.runs(name, 1, 1, 1) for name in "abc"}, pairs=1, num_rounds=3)
    assert clock.log == "abcbcacab"
    with pytest.raises(EdjeError, match="num_rounds is 0"):
        interleave({"a": lambda: None}, pairs=1, num_rounds=0)


def test_who_has_settled_takes_no_more_turns(clock):
    runs = {
        "a": clock.runs("a", 5.0, 1.0, 1.005),  # settles in the third round
        "b": clock.runs("b", 1.0, 1.0),
        "c": clock.runs("c", 1.0, 2.0, 3.0, 4.0),  # never settles
        "d": clock.runs("d", 9.0),
    }
    times = harness.settle(runs, most=4, once=["d"])
    assert [len(took.wall_ms) for took in times.values()] == [3, 2, 4, 1]
    assert clock.log == "abcd" + "bca" + "ac" + "c"
    late = {name: clock.runs(name, 8.0, 4.0, 2.0) for name in "ab"}
    found = harness.settle(late, most=3, seconds=10.0)
    assert [len(took.wall_ms) for took in found.values()] == [2, 2], "two rounds, then time is up"


def test_those_that_are_compared_take_equally_many_turns(clock):
    halves = [64.0 / 2**turn for turn in range(9)]
    runs = {
        "a": clock.runs("a", *[1.0] * 4),
        "b": clock.runs("b", 2.0, 1.0, 3.0, 1.0),  # settles in the fourth round
        "c": clock.runs("c", 1.0, 1.0),
        "d": clock.runs("d", *halves),  # never settles
    }
    found = harness.settle(runs, most=3, together=["ab"])
    assert [len(took.wall_ms) for took in found.values()] == [4, 4, 2, 3]
    for seconds, turns in ((500.0, 6), (70.0, 3)):  # 65, 98, 115 seconds after so many turns
        runs = {"c": clock.runs("c", *[1.0] * 6), "d": clock.runs("d", *halves)}
        found = harness.settle(runs, most=3, seconds=seconds, together=["cd"])
        assert [len(took.wall_ms) for took in found.values()] == [turns, turns]


def test_conditions_name_machine_versions_and_commit(monkeypatch):
    found = conditions(batch=16)
    assert found["batch"] == 16
    assert found["cores"] >= 1
    assert found["cpu"]
    assert all(found["versions"][name] for name in ("numpy", "openvino", "onnxruntime"))
    assert f"{found['cores']} cores, batch 16, load" in harness.conditions_line(found, "batch")
    monkeypatch.setattr(harness, "ROOT", harness.Path("/"))
    assert conditions()["commit"] is None


@pytest.mark.parametrize(
    ("result", "status"),
    [({}, 0), ({"faults": []}, 0), ({"faults": ["slow"]}, 1), ({"broken": ["int8"]}, 1)],
)
def test_a_command_says_and_writes_its_figures_and_fails_where_they_fall_short(
    tmp_path, capsys, result, status
):
    options = Namespace(name="tried", out=tmp_path / "results")
    scratch = []
    assert run_benchmark(options, lambda *given: scratch.append(given[0]) or result, str) == status
    written = json.loads((tmp_path / "results" / "tried.json").read_text())
    assert written["result"] == result
    assert written["faults"] == result.get("faults", [])
    assert written["machine_info"]["cpu"]["count"] >= 1
    assert capsys.readouterr().out.startswith(f"{result}\nwritten to ")
    assert not scratch[0].exists()


def test_a_command_that_cannot_measure_ends_in_one_sentence(tmp_path, capsys):
    def measure(scratch, progress):
        raise EdjeError("no such demo")

    assert run_benchmark(Namespace(name="tried", out=tmp_path), measure, str) == 2
    assert capsys.readouterr().err.strip() == "no such demo"
    assert not list(tmp_path.iterdir())


BENCHMARKS = sorted(path.stem for path in Path(harness.__file__).parent.glob("bench_*.py"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_keeps_its_figures_only_where_out_says(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        import_module(f"edje.perf.{name}").main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--out OUT folder of the JSON; default: .cache/perf; perf/results keeps it" in told


def test_git_ignores_where_benchmarks_write_by_default():
    root = Path(harness.__file__).parent.parent
    ignored = ["git", "-C", str(root), "check-ignore", "-q", str(harness.SCRATCH / "store.json")]
    assert subprocess.run(ignored, check=False).returncode == 0
