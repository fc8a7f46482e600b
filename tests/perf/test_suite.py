"""What `make bench` measures beside the peers, on a tiny engine and in few runs."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from edje.errors import EdjeError
from edje.perf import cold, load, suite
from edje.perf.cold import measure_cold
from edje.perf.harness import ROOT, scores_in_order
from edje.perf.load import measure_load
from edje.perf.report import Measured, benchmark_json


def test_a_cold_start_is_measured_from_outside_and_told_in_parts(tiny_engine, monkeypatch):
    monkeypatch.setattr(cold, "WORDPIECES", 3)
    monkeypatch.setattr(cold, "EXPECTED_S", 0.0)
    result = json.loads(json.dumps(measure_cold(tiny_engine, num_runs=1)))
    whole, *parts = (one["stats"]["min"] for one in result["benchmarks"])
    assert [one["name"] for one in result["benchmarks"]] == [
        "edje rerank",
        *(f"of it: {name}" for name in ("open", "warm up", "rank", "start")),
    ]
    assert sum(parts) == pytest.approx(whole)
    [fault] = result["faults"]
    assert f"took {whole:.2f} s, expected under 0.0" in fault


def test_more_clients_wait_and_every_answer_is_checked(tiny_engine, monkeypatch):
    for name, value in {"NUM_IMAGES": 40, "WORDPIECES": 3, "LEAST_REQUESTS": 2}.items():
        monkeypatch.setattr(load, name, value)
    given = {"candidates": 40, "seconds": 0.0}
    result = measure_load(tiny_engine, clients=[1, 3], **given)
    found = [(one["params"]["clients"], one["stats"]["rounds"]) for one in result["benchmarks"]]
    assert found == [(1, 2), (3, 6)]
    monkeypatch.setattr("edje.perf.serve_traffic.scores_in_order", one_off)
    with pytest.raises(EdjeError, match="requests failed") as caught:
        measure_load(tiny_engine, clients=[1], **given)
    assert "the server ranked otherwise than Reranker.rank" in str(caught.value)
    with pytest.raises(EdjeError, match="50 candidates of 40 images"):
        measure_load(tiny_engine, clients=[1], candidates=50)


def one_off(reranker, query):
    """Return scores of which one is not the server's."""
    scores = scores_in_order(reranker, query)
    scores[np.argmin(scores)] += 1000
    return scores


def rank(images, us):
    return Measured("rank", "stages", [us * 1e-4], pairs=100, params={"images": images})


def test_a_cost_that_is_not_flat_is_named():
    flat = benchmark_json([rank(10, 1000.0), rank(20, 1080.0), rank(40, 1000.0)])
    assert suite.uneven(flat, "rank", "images") == []
    steep = benchmark_json([rank(10, 1000.0), rank(20, 1010.0), rank(40, 1200.0)])
    [fault] = suite.uneven(steep, "rank", "images")
    assert fault == (
        "rank costs 1,000.0 us a pair at 10 images and 1,200.0 at 40, expected 10% at most between"
    )


@pytest.fixture
def parts(monkeypatch):
    """Two parts, of which the second cannot be measured, and no engines."""
    result = {**benchmark_json([rank(10, 1000.0)]), "swept": "images", "faults": ["slow"]}
    made = {
        "images": suite.Part(100, lambda out: result, suite.draw_sweep),
        "cold": suite.Part(20, lambda out: 1 / 0),
    }
    monkeypatch.setattr(suite, "PARTS", made)
    for name in ("scorer", "demo"):
        monkeypatch.setattr(suite, name, lambda: None)


def test_parts_are_printed_written_and_what_falls_short_is_returned(parts, tmp_path, capsys):
    assert suite.run_suite(tmp_path, ["images"]) == ["images: slow"]
    assert json.loads((tmp_path / "images.json").read_text())["faults"] == ["slow"]
    assert ">images<" in (tmp_path / "images.svg").read_text()
    shown = capsys.readouterr()
    assert "rank[images=10]" in shown.out
    assert "[1 of 1] images, about 1:40; 0:00 gone, about 1:40 left" in shown.err
    with pytest.raises(EdjeError, match="no part is called imags, expected images, cold"):
        suite.run_suite(tmp_path, ["imags"])


def test_what_is_left_is_said_before_each_part(parts):
    said = suite.said_before("cold", ["images", "cold"], 95.0)
    assert said == "[2 of 2] cold, about 0:20; 1:35 gone, about 0:20 left"


def test_the_plan_and_the_suite_agree_and_stay_below_eight_minutes():
    text = (ROOT / "perf" / "PLAN.md").read_text(encoding="utf-8")
    planned = dict(re.findall(r"^\| (\w+) \| (\d+) \|", text, re.MULTILINE))
    expected = {name: part.seconds for name, part in suite.PARTS.items()}
    assert {name: int(planned[name]) for name in planned} == {
        "engines": suite.ENGINE_SECONDS,
        **expected,
    }
    assert suite.ENGINE_SECONDS + sum(expected.values()) <= 8 * 60
