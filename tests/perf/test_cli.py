"""`edje bench`: its verbs, what they write, and what they say where they cannot run."""

from __future__ import annotations

import json
import sys

import pytest

from edje.engines.manifest import Profile
from edje.perf.cli import OLDER, sweep_of
from edje.perf.free_engine import write_free_engine
from edje.runtime.cli import main

SMALL = ["--candidates", "20", "--images", "30", "--wordpieces", "3", "--seconds", "0.01"]


@pytest.fixture
def free_engine(tiny_bundle, tmp_path):
    return write_free_engine(tiny_bundle, tmp_path / "free", Profile(16, (16, 32, 64)))


def test_bench_shows_its_verbs_and_their_options(capsys):
    for words in (["bench", "--help"], ["bench"]):
        main(words)
        shown = "".join(capsys.readouterr())
        assert all(f"  {name.replace('_', '-')} " in shown for name in ("run", "sweep", *OLDER))
    assert main(["bench", "run", "--help"]) == 0
    assert "--candidates" in capsys.readouterr().out
    assert main(["bench", "end-to-end", "--help"]) == 0
    assert "usage: edje bench end-to-end" in capsys.readouterr().out


def test_a_run_writes_table_json_and_chart(free_engine, tmp_path, capsys):
    words = ["bench", "run", str(free_engine), *SMALL, "--stages", "tokenise,rank", "--no-roof"]
    words += ["--out", str(tmp_path), "--name", "mine"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "tokenise" in shown.out
    assert f"written to {tmp_path}/mine.json" in shown.err
    assert main([*words, "-q"]) == 0
    assert "written" not in capsys.readouterr().err
    written = json.loads((tmp_path / "mine.json").read_text())
    assert [one["name"] for one in written["benchmarks"]] == ["tokenise", "rank"]
    assert "microseconds a pair" in (tmp_path / "mine.svg").read_text()


def test_a_sweep_is_named_by_what_is_swept(free_engine, tmp_path):
    words = ["bench", "sweep", "batch=2,8", str(free_engine), *SMALL, "--stages", "enqueue"]
    assert main([*words, "--no-roof", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "batch.json").read_text())
    assert [one["params"] for one in written["benchmarks"]] == [{"batch": 2}, {"batch": 8}]
    assert (tmp_path / "batch.svg").exists()
    assert sweep_of("images=1,20") == ("images", [1, 20])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nowhere"], "nowhere is not an engine folder"),
        (["run", "nowhere", "--free"], "name no engine"),
        (["sweep", "batch=a"], "got 'batch=a', expected a name and whole numbers"),
        (["sweep", "batch"], "got 'batch', expected a name and whole numbers"),
    ],
)
def test_what_cannot_run_is_said_in_one_sentence(words, message, capsys, tmp_path):
    assert main(["bench", *words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_installed_package_says_where_benchmarks_are(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "edje.perf.cli", None)
    monkeypatch.setattr("edje.runtime.cli.app.BENCHMARKS", "edje.perf.not_there")
    assert main(["bench", "run"]) == 2
    assert "benchmarks come with a checkout" in capsys.readouterr().err
