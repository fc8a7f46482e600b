"""A step that crashes, hangs or prints garbage is a result; what it had reported still counts."""

import os
import sys
import time

import pytest

from edje.perf.gpu_steps import FAILED, OK, TIMED_OUT, Report, run_step

REPORT = "from edje.perf.gpu_steps import Report; from pathlib import Path; import sys\n"
REPORT += "report = Report(Path(sys.argv[1]), 9)\n"


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


def test_a_step_that_raises_says_what_in_its_last_line(run):
    result = run(REPORT + "report.put(a=1); raise SystemError('the GPU is on fire')")
    assert result.status == FAILED
    assert result.reason.startswith("exit status 1: ")
    assert result.reason.endswith("SystemError: the GPU is on fire")
    assert result.output.startswith("Traceback")
    assert result.values == {"a": 1}


def test_a_step_that_is_killed_names_the_signal(run):
    result = run(REPORT + "report.put(a=1); import os; os.abort()")
    assert result.status == FAILED
    assert result.reason.startswith("killed by SIGABRT")
    assert result.values == {"a": 1}


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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read"),
        ("\\xff\\xfe", "cannot be read"),
        ("[1, 2]", "holds a list"),
    ],
)
def test_a_report_that_is_garbage_fails_the_step(run, content, reason):
    code = f"import sys; open(sys.argv[1], 'wb').write(b'{content}'); print('\\udcff' * 0 + '%$')"
    result = run(code)
    assert result.status == FAILED
    assert reason in result.reason
    assert result.values == {}


def test_a_step_without_a_report_fails(run):
    assert run("pass").reason == "it reported nothing"


def test_a_step_gets_the_environment_it_needs(run):
    code = REPORT + "import os; report.put(a=os.environ['EDJE_X'], b='PATH' in os.environ)"
    assert run(code, env={"EDJE_X": "y"}).values == {"a": "y", "b": True}
    assert "EDJE_X" not in os.environ


def test_a_reports_deadline_passes(tmp_path):
    assert Report(tmp_path / "r", 100).left_s > 90
    assert Report(tmp_path / "r", -1).left_s < 0
