"""The gate: what launches and counters come to, and real runs of two small trees."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import edje
from edje.errors import EdjeError
from edje.perf import gate_trial
from edje.perf.gate import GateOptions, run_gate
from edje.perf.gate_judging import Measurement, counter_verdicts, joined, time_verdicts
from edje.perf.gate_trees import Tree, Trees
from edje.perf.gate_trial import NO_OP, PLANTS, Trial, loop_ns, planted
from edje.perf.gate_turns import Launch
from edje.perf.harness import ROOT
from edje.perf.report import folded
from edje.perf.verdicts import ExitCode, exit_code
from edje.runtime.cli import main

PACKAGE = Path(edje.__file__).parent
LEFT_OUT = shutil.ignore_patterns(".*", "tests", "build", "demo-out", "results", "__pycache__")
TOKENISER = PLANTS["tokenising"]


def launches(*ratios, cpu=None):
    """Launches whose head took so many times the base's time."""
    cpus = ratios if cpu is None else cpu
    pairs = zip(ratios, cpus, strict=True)
    return Measurement([Launch(1e-3, 1e-3 * one, 2e-3, 2e-3 * other) for one, other in pairs])


def test_a_stage_fails_if_both_measurements_say_so():
    slow, fine = launches(1.1, 1.11, 1.09, 1.1, 1.1), launches(1.0, 1.01, 0.99, 1.0, 1.0)
    fast = launches(0.8, 0.81, 0.79, 0.8, 0.8)
    first = {"lucky": slow, "slow": slow, "fast": fast, "same": fine}
    found = time_verdicts(first, [{"lucky": fine, "slow": slow}], 0.05, 10)
    status = {f"{one.benchmark} {one.field}": one.status for one in found}
    assert status == {
        "lucky time": "ok",
        "lucky cpu time": "ok",
        "slow time": "worse",
        "slow cpu time": "worse",
        "fast time": "better",
        "fast cpu time": "better",
        "same time": "ok",
        "same cpu time": "ok",
    }
    assert exit_code(found) == ExitCode.REGRESSION
    slow_time = found[2]
    assert slow_time.change == pytest.approx(0.1, abs=1e-3)
    assert slow_time.note.count("5 launches") == 2


def test_where_two_measurements_disagree_a_third_decides():
    slow, fine = launches(*[1.1] * 5), launches(*[1.0] * 5)
    first, second = {"slow": slow, "lucky": slow}, {"slow": fine, "lucky": fine}
    found = time_verdicts(first, [second, {"slow": slow, "lucky": fine}], 0.05, 10)
    assert [one.status for one in found] == ["worse", "worse", "ok", "ok"]


def test_wall_time_alone_is_enough_but_it_must_be_the_same_twice():
    waits = launches(*[1.2] * 5, cpu=[1.0] * 5)
    works = launches(*[1.0] * 5, cpu=[1.2] * 5)
    assert waits.decision(0.05, 10) == works.decision(0.05, 10) == "slower"
    found = time_verdicts({"a": waits, "b": waits}, [{"a": waits, "b": works}], 0.05, 10)
    assert [one.status for one in found] == ["worse", "ok", "ok", "ok"]
    unsure = launches(1.0, 1.1, 1.0, 1.1, 1.0, cpu=[1.0] * 5)
    assert unsure.decision(0.05, 10) == "open"


def test_counters_that_are_exact_and_those_that_are_not():
    base = {"read": {"reads": (64, 64), "calls": (30, 40), "peak_bytes": (1000, 1000)}}
    head = {"read": {"reads": (65, 65), "calls": (40, 41), "peak_bytes": (1250, 1250)}}
    found = {one.field: one for one in counter_verdicts(base, head, {})}
    assert found["reads"].status == "worse"
    assert found["calls"].status == "ok"
    assert found["calls"].note == "30..40; 40..41"
    assert found["peak_bytes"].status == "ok"  # within its slack
    for allowed in ({"read.reads": 0.02}, {"reads": 0.02}):
        assert counter_verdicts(base, head, allowed)[0].status == "ok"
    assert counter_verdicts(head, base, {})[0].status == "better"
    again = joined(head["read"], {"reads": (64, 64), "calls": (50, 50)})
    assert again == {"reads": (64, 65), "calls": (40, 50)}


def test_what_a_command_line_may_say(capsys):
    options = GateOptions.of(
        stages=["read"], limit=0.1, allowed=["read.read_calls=2"], pinned=False
    )
    assert (options.stages, options.allowed) == (["read"], {"read.read_calls": 0.02})
    assert options.cores == ()
    assert GateOptions.of(candidates=32).batch == 32
    with pytest.raises(EdjeError) as caught:
        GateOptions.of(stages=["x"], limit=0.0, allowed=["calls"])
    assert len(caught.value.faults) == 3
    assert main(["bench", "gate", "--stages", "nothing"]) == 2
    assert "no stage is called nothing" in capsys.readouterr().err


@pytest.fixture
def trees(tmp_path):
    """This package twice, without what no worker needs."""
    sides = []
    for name in ("base", "head"):
        side = Tree(name, tmp_path / name, name)
        shutil.copytree(PACKAGE, side.package, ignore=LEFT_OUT)
        sides.append(side)
    return Trees(*sides)


def plant(trees, *lines):
    path = trees.head.package / TOKENISER.file
    path.write_text(planted(path.read_text(), TOKENISER.function, lines))


def run(trees, engine, **more):
    """Gate the tokeniser in a few turns of a tiny engine."""
    sizes = {"candidates": 8, "batch": 8, "images": 8, "wordpieces": 3}
    options = GateOptions(
        stages=("tokenise",), engine=engine, limit=0.5, rounds=3, max_launches=1, **sizes, **more
    )
    result = run_gate(trees, options, lambda line: None)
    (entry,) = json.loads(json.dumps(result.to_json(trees, options)))["benchmarks"]
    assert entry["fullname"] == "gate::tokenise"
    assert entry["extra_info"]["pairs"] == 8
    assert options.counters == bool(entry["extra_info"]["counters"])
    return {one.field: one.status for one in result.verdicts}


@pytest.mark.slow
def test_a_slower_head_fails_in_time_and_in_counters(trees, tiny_engine):
    turns = round(500_000 / loop_ns())  # half a millisecond: many times what tokenising takes
    plant(trees, "str.strip(' ')", f"for _ in range({turns}):", "    pass")
    found = run(trees, tiny_engine)
    assert found["time"] == found["cpu time"] == "worse"
    assert found["c_calls"] == "worse"
    assert found["python_calls"] == "ok"


@pytest.mark.slow
def test_the_same_code_passes(trees, tiny_engine):
    plant(trees, "# nothing but a comment")
    assert set(run(trees, tiny_engine).values()) == {"ok"}


@pytest.mark.slow
def test_a_head_that_does_not_run_cannot_be_compared(trees, tiny_engine):
    plant(trees, "raise RuntimeError('planted')")
    with pytest.raises(EdjeError, match=r"worker of head \(head\) ended(.|\n)*planted"):
        run(trees, tiny_engine, counters=False)


def trial_run(kind, *failing):
    return {"kind": kind, "failing": list(failing), "ratios": [1.1], "seconds": 3.0, "load": 2.0}


def test_a_trial_that_was_interrupted_says_how_often_and_goes_on(tmp_path):
    runs = [trial_run("reading", "read time"), trial_run("reading"), trial_run(NO_OP)]
    asked = Trial(["reading", NO_OP], 2, 10.0, 0.1, print)
    result = gate_trial.result_of(asked, runs)
    assert result["faults"] == [
        "reading: 1 of 2 failed, expected 2",
        "no-op: 1 of 2 repeats were done",
    ]
    assert "1 of 2" in gate_trial.summary(result)
    path = tmp_path / "gate_trial.json"
    assert gate_trial.earlier_runs(path, 0.1) == []
    path.write_text(json.dumps(folded("gate_trial", result)))
    assert gate_trial.earlier_runs(path, 0.1) == runs
    with pytest.raises(EdjeError, match=r"slowdown: 0\.1, here 0\.2"):
        gate_trial.earlier_runs(path, 0.2)


def test_the_ready_workflow_names_what_there_is(capsys):
    text = (ROOT / "perf" / "ci" / "perf-gate.yml").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z-]+)", text))
    assert targets == {"setup", "perf-gate"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}: ", makefile, re.MULTILINE) for target in targets)
    assert main(["bench", "gate", "--help"]) == 0
    offered = capsys.readouterr().out
    [given] = re.findall(r'GATE_ARGS="(.*?)"', text)
    words = dict(zip(given.split()[::2], given.split()[1::2], strict=True))
    assert all(f"  {option} <" in offered for option in words)
    [kept] = re.findall(r"\n +path: \|\n((?: +\S+\n?)+)", text)
    written = {words["--markdown"], words["--junit"], f"{words['--out']}/gate.json"}
    assert set(kept.split()) == written
    assert "[default: gate]" in offered
