"""A step that crashes, hangs or prints garbage is a result; what it had reported still counts."""

import os
import sys
import time

import pytest

from edje.perf.gpu_steps import FAILED, OK, TIMED_OUT, Report, run_step

REPORT = "from edje.perf.gpu_steps import Report; from pathlib import Path; import sys\n"
REPORT += "report = Report(Path(sys.argv[1]), 9)\n"
WRITE = "import sys; open(sys.argv[1], 'wb').write("


@pytest.fixture
def run(tmp_path):
    def run(code, limit_s=60.0, env=None):
        path = tmp_path / "step.json"
        return run_step("step", [sys.executable, "-c", code, str(path)], path, limit_s, env)

    return run


def test_what_a_step_reports_comes_back(run):
    result = run(REPORT + "report.put(a=1); report.add('rows', {'b': 2}); report.add('rows', {})")
    assert (result.status, result.reason) == (OK, None)
    assert result.values == {"a": 1, "rows": [{"b": 2}, {}]}
    assert result.output == ""


@pytest.mark.parametrize(
    ("code", "begins", "ends", "values"),
    [
        (
            REPORT + "report.put(a=1); raise SystemError('the GPU is on fire')",
            "exit status 1: ",
            "SystemError: the GPU is on fire",
            {"a": 1},
        ),
        (
            REPORT + "report.put(a=1); import os; print('so long', flush=True); os.abort()",
            "killed by SIGABRT: ",
            "so long",
            {"a": 1},
        ),
        ("pass", "it reported nothing", "", {}),
        (WRITE + "b'{')", "its report cannot be read: ", "", {}),
        (WRITE + "bytes([255, 254]))", "its report cannot be read: ", "", {}),
        (WRITE + "b'[1, 2]')", "its report holds a list, expected an object", "", {}),
    ],
)
def test_a_step_that_ends_badly_says_how_and_keeps_what_it_reported(
    run, code, begins, ends, values
):
    result = run(code)
    assert result.status == FAILED
    assert result.reason.startswith(begins)
    assert result.reason.endswith(ends)
    assert ends in result.output
    assert result.values == values


def test_a_step_that_hangs_ends_with_all_its_children(run, tmp_path):
    child = tmp_path / "child"
    code = REPORT + (
        "report.put(a=1); import subprocess, time; print('still here', flush=True)\n"
        f"p = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(p.pid))\n"
        "time.sleep(60)"
    )
    result = run(code, limit_s=2.0)
    assert (result.status, result.reason) == (TIMED_OUT, "over its 2 s")
    assert result.output == "still here\n"
    assert result.values == {"a": 1}
    assert _is_gone(int(child.read_text()))


def _is_gone(pid):
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_step_gets_the_environment_it_needs(run):
    code = REPORT + "import os; report.put(a=os.environ['EDJE_X'], b='PATH' in os.environ)"
    assert run(code, env={"EDJE_X": "y"}).values == {"a": "y", "b": True}
    assert "EDJE_X" not in os.environ


def test_a_reports_deadline_passes(tmp_path):
    assert Report(tmp_path / "r", 100).left_s > 90
    assert Report(tmp_path / "r", -1).left_s < 0
