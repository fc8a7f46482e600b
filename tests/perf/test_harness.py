"""The harness takes turns, reports minima, and says under which conditions."""

import json
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from edje.errors import EdjeError
from edje.perf import harness
from edje.perf.harness import conditions, interleave, speedup, table, write_result


@pytest.fixture
def clock(monkeypatch):
    """A clock that only contestants move, so that times are exact."""

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(harness, "perf_counter", clock)
    monkeypatch.setattr(harness, "process_time", lambda: 2 * clock.now)
    return clock


def runner(clock, seconds, log, name):
    durations = iter(seconds)

    def run():
        log.append(name)
        clock.now += next(durations)

    return run


def test_minima_medians_and_ratio(clock):
    log = []
    timings = interleave(
        {
            "fast": runner(clock, [3.0, 1.0, 2.0], log, "fast"),
            "slow": runner(clock, [4.0, 9.0, 5.0], log, "slow"),
        },
        pairs=8,
        num_rounds=3,
    )
    fast, slow = timings["fast"], timings["slow"]
    assert (fast.min_ms, fast.median_ms, fast.min_cpu_ms) == (1000.0, 2000.0, 2000.0)
    assert (slow.min_ms, slow.median_ms) == (4000.0, 5000.0)
    assert (fast.pairs_per_s, slow.pairs_per_s) == (8.0, 2.0)
    assert speedup(fast, slow) == 4.0
    assert fast.num_runs == 3
    assert "fast" in table(timings)
    assert "8.0" in table(timings)


def test_everybody_runs_once_a_round_and_starts_in_turn(clock):
    log = []
    names = ("a", "b", "c")
    interleave({name: runner(clock, [1.0] * 3, log, name) for name in names}, pairs=1, num_rounds=3)
    assert log == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_no_rounds():
    with pytest.raises(EdjeError, match="num_rounds is 0"):
        interleave({"a": lambda: None}, pairs=1, num_rounds=0)


def test_conditions_name_machine_versions_and_commit(monkeypatch):
    found = conditions(batch=16)
    assert found["batch"] == 16
    assert found["cores"] >= 1
    assert found["cpu"]
    assert {"numpy", "openvino", "onnxruntime"} <= set(found["versions"])
    assert all(found["versions"][name] for name in ("numpy", "openvino", "onnxruntime"))
    monkeypatch.setattr(harness, "ROOT", harness.Path("/"))
    assert conditions()["commit"] is None


def test_results_are_json(tmp_path):
    path = write_result("name", {"a": 1.5}, tmp_path / "results")
    assert json.loads(path.read_text()) == {"a": 1.5}


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
