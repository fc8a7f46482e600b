"""`edje bench compare`: what fails, what is refused, and how it is told."""

from __future__ import annotations

import copy
import json
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.errors import EdjeError
from edje.perf.compare import Limit, ResultFile, compare, compare_files
from edje.perf.report import Measured, benchmark_json
from edje.perf.verdicts import ExitCode
from edje.runtime.cli import main

# As pytest-benchmark 5 writes it, shortened.
PLAIN = {
    "machine_info": {
        "node": "runner-1",
        "machine": "x86_64",
        "python_version": "3.12.1",
        "cpu": {"brand_raw": "AMD EPYC", "count": 4, "hz_actual_friendly": "2.4 GHz"},
    },
    "commit_info": {"id": "abc", "dirty": False},
    "benchmarks": [
        {
            "group": None,
            "name": "test_read",
            "fullname": "perf/test_read.py::test_read",
            "params": None,
            "stats": {
                "min": 0.010,
                "max": 0.030,
                "mean": 0.012,
                "stddev": 0.001,
                "median": 0.011,
                "iqr": 0.001,
                "rounds": 4,
                "iterations": 1,
                "ops": 83.3,
                "data": [0.010, 0.011, 0.011, 0.030],
            },
        }
    ],
    "version": "5.3.1",
}


def measured(seconds=(0.01, 0.011, 0.012), name="read", counters=None, **params):
    """One benchmark of 64 pairs."""
    found = {"python_calls": 30, "read_calls": 64} if counters is None else counters
    return Measured(name, "stages", seconds, 64, params=params, counters=found)


@pytest.fixture
def write(tmp_path):
    """Return what writes a result file: of our benchmarks, or of ready JSON."""

    def written(name, *benchmarks, values=None):
        path = tmp_path / f"{name}.json"
        values = benchmark_json(benchmarks) if values is None else values
        path.write_text(json.dumps(values), encoding="utf-8")
        return path

    return written


def verdicts(base, head, *limits, **how):
    """Return (field, status) of what fails or moved."""
    files = ResultFile.read(base), ResultFile.read(head)
    found = compare(*files, [Limit.parse(text) for text in limits], **how)
    return [(one.field, one.status) for one in found]


@pytest.mark.parametrize(
    ("limit", "worse"),
    [
        ("throughput:5%", True),
        ("throughput:10%", False),
        ("min:5%", True),
        ("min:12%", False),
        ("min:0.5ms", True),
        ("min:2ms", False),
        ("p50:900us", True),
        ("p99:0.0015", False),
        ("p99:8.5%", True),
    ],
)
def test_a_field_may_be_worse_by_its_limit(write, limit, worse):
    base = write("base", measured())
    head = write("head", measured([0.011, 0.012, 0.0133]))
    field = limit.partition(":")[0]
    assert verdicts(base, head, limit) == [(field, "worse" if worse else "ok")]
    assert verdicts(base, base, limit) == [(field, "ok")]


def test_less_time_is_better_and_more_throughput_is(write):
    base, head = write("base", measured([0.02])), write("head", measured([0.01]))
    assert verdicts(base, head, "min:5%", "throughput:5%") == [
        ("min", "better"),
        ("throughput", "better"),
    ]


def test_counters_fail_one_by_one(write):
    base = write("base", measured(counters={"calls": 100, "reads": 0, "gone": 1}))
    head = write("head", measured(counters={"calls": 101, "reads": 1, "fresh": 1}))
    assert verdicts(base, head, "counters:0") == [
        ("counters.calls", "worse"),
        ("counters.reads", "worse"),
        ("counters.gone", "missing"),
        ("counters.fresh", "new"),
    ]
    assert verdicts(base, head, "counters.calls:1%") == [("counters.calls", "ok")]


def test_a_missing_benchmark_fails_a_new_one_does_not(write, capsys):
    base = write("base", measured(), measured(name="rank"))
    head = write("head", measured(), measured(name="serve"))
    assert verdicts(base, head, "min:5%") == [
        ("min", "ok"),
        ("benchmark", "missing"),
        ("benchmark", "new"),
    ]
    assert compare_files(base, head, []) == ExitCode.REGRESSION
    assert compare_files(base, head, [], allow_missing=True) == ExitCode.FINE
    assert "stages::rank (benchmark)" in capsys.readouterr().out


def test_what_would_mislead_is_refused_all_of_it_at_once(write):
    other = benchmark_json([measured(batch=8), measured([0.01], name="x", counters={})])
    other["machine_info"]["cpu"]["brand_raw"] = "Another CPU"
    for benchmark in other["benchmarks"]:
        benchmark["fullname"] = benchmark["fullname"].partition("[")[0]
    base, head = write("base", measured(), measured(name="x")), write("head", values=other)
    with pytest.raises(EdjeError) as caught:
        verdicts(base, head, "counters:0", "stddev:5%")
    text = str(caught.value)
    assert "machine: cpu is" in text
    assert "'Another CPU'" in text
    assert "stages::read: ran with {} and with {'batch': 8}" in text
    assert "stages::x" in text
    assert "has no counters" in text
    assert "--across-machines" in text


def test_other_machines_are_compared_on_request(write):
    other = benchmark_json([measured()])
    other["machine_info"]["cpu"]["count"] = 999
    base, head = write("base", measured()), write("head", values=other)
    with pytest.raises(EdjeError, match="cores is"):
        verdicts(base, head, "min:5%")
    assert verdicts(base, head, "min:5%", across_machines=True) == [("min", "ok")]


def test_pytest_benchmarks_own_files(write):
    slower = copy.deepcopy(PLAIN)
    slower["machine_info"]["node"] = "runner-2"
    slower["machine_info"]["cpu"]["hz_actual_friendly"] = "2.5 GHz"
    slower["benchmarks"][0]["stats"]["data"] = [0.010, 0.011, 0.011, 0.040]
    slower["benchmarks"][0]["stats"]["ops"] = 70.0
    base, head = write("base", values=PLAIN), write("head", values=slower)
    found = verdicts(base, head, "min:1%", "p50:1%", "p99:5ms", "throughput:5%")
    assert found == [("min", "ok"), ("p50", "ok"), ("p99", "worse"), ("throughput", "worse")]
    slower["machine_info"]["cpu"]["count"] = 2
    with pytest.raises(EdjeError, match=r"cpu\.count is 4 and 2"):
        verdicts(base, write("other", values=slower), "min:1%")


@pytest.mark.parametrize(
    "text", ["", "throughput", "speed:5%", "p99:5", "p99:-5%", "throughput:5ms", "counters:2ms"]
)
def test_a_limit_that_is_none(text):
    if text == "p99:5":  # seconds, as pytest-benchmark takes them
        assert Limit.parse(text).allowed == 5.0
        return
    with pytest.raises(EdjeError, match="expected FIELD:AMOUNT"):
        Limit.parse(text)


@given(
    base=st.floats(1e-6, 1e6),
    change=st.floats(-0.9, 9.0),
    percent=st.floats(0.0, 500.0).map(lambda one: round(one, 3)),
    bigger=st.booleans(),
)
def test_status_is_what_the_change_says(base, change, percent, bigger):
    limit = Limit.parse(f"{'throughput' if bigger else 'min'}:{percent:.3f}%")
    head = base * (1 + change)
    worsening = -change if bigger else change
    if abs(abs(worsening) - percent / 100) < 1e-9:
        return
    status = limit.status(base, head, bigger_is_better=bigger)
    expected = "worse" if worsening > percent / 100 else "ok"
    assert status == ("better" if worsening < -percent / 100 else expected)


def test_the_command_its_exit_codes_and_its_reports(write, tmp_path, capsys):
    base = write("base", measured(), measured(name="a|b"))
    head = write("head", measured([0.02]), measured(name="a|b"))
    page, tests = tmp_path / "new" / "gate.md", tmp_path / "gate.xml"
    words = ["bench", "compare", str(base), str(head), "--markdown", str(page)]
    words += ["--junit", str(tests)]
    assert main([*words, "--fail", "throughput:5%"]) == 1
    assert "1 of 2 comparisons fail: stages::read (throughput)" in capsys.readouterr().out
    lines = page.read_text().splitlines()
    assert lines[0] == "## edje bench compare"
    assert "| stages::read | throughput | 6,400 pairs/s | 3,200 pairs/s | -50.0% |" in lines[6]
    assert "a\\|b" in lines[7]
    suite = ElementTree.parse(tests).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    assert suite.find("testcase/failure").get("type") == "worse"

    assert main([*words, "--fail", "throughput:60%"]) == 0
    assert ElementTree.parse(tests).getroot().get("failures") == "0"

    head.write_text("{}")
    assert main([*words, "--fail", "throughput:5%"]) == 2
    assert "holds no benchmarks" in capsys.readouterr().err
    assert "cannot compare" in page.read_text()
    assert ElementTree.parse(tests).getroot().get("errors") == "1"


def test_files_that_cannot_be_used_say_why(write, tmp_path):
    with pytest.raises(EdjeError, match="cannot read"):
        ResultFile.read(tmp_path / "none.json")
    twice = copy.deepcopy(PLAIN)
    twice["benchmarks"] += [twice["benchmarks"][0], {"name": "no stats"}]
    bad = copy.deepcopy(PLAIN["benchmarks"][0])
    bad["fullname"], bad["stats"]["min"] = "zero", 0.0
    twice["benchmarks"].append(bad)
    with pytest.raises(EdjeError) as caught:
        ResultFile.read(write("twice", values=twice))
    text = str(caught.value)
    assert "benchmark 1: a second 'perf/test_read.py::test_read'" in text
    assert "benchmark 2: KeyError: 'stats'" in text
    assert "'min' of 'zero' not positive" in text
