"""The README's part on speed is what the committed results say; a changed result is noticed."""

from __future__ import annotations

import copy
import json

import pytest

from edje.errors import EdjeError
from edje.perf import readme
from edje.perf.readme import BEGIN, END, differences, load, replaced, section
from edje.perf.readme_chart import H200, LONG, SHORT, chart_digest, panels
from edje.perf.report import Measured, benchmark_json


def test_readme_and_chart_are_written_from_the_committed_results():
    assert list(differences(load())) == []


def test_a_changed_result_is_noticed_in_text_and_chart():
    results = copy.deepcopy(load())
    for row in results[H200]["ladder"]:
        if row.get("pairs_per_s"):
            row["pairs_per_s"] *= 2
    assert len(list(differences(results))) == 2


def peers():
    runs = [
        Measured(
            name,
            "peers",
            [pairs / speed * (1 if length == SHORT else 2)],
            pairs=pairs,
            params={"wordpieces": length},
            conditions={"what": what, "kind": kind, "function": function},
        )
        for length in (SHORT, LONG)
        for name, what, kind, function, pairs, speed in (
            ("auto", "edje, auto", "ours", "rounded", 1000, 400.0),
            ("openvino-int8", "edje, OpenVINO int8", "ours", "rounded", 1000, 401.0),
            ("openvino-direct", "OpenVINO int8", "library", "rounded", 1000, 395.0),
            ("openvino-slow", "OpenVINO int8, otherwise", "library", "rounded", 1000, 300.0),
            ("hf-official-fp32", "Hugging Face, as evaluated", "peer", "float32", 32, 25.0),
            ("maxsim", "MaxSim over the same store", "peer", "other", 1000, 9000.0),
        )
    ]
    stores = [Measured("lmdb", "stores", [0.01], pairs=256, params={"records": 256})]
    return benchmark_json([*runs, *stores])


def suite():
    def rank(over, value):
        return Measured("rank", "stages", [0.25], pairs=100, params={over: value})

    where = {"engine": "openvino int8", "candidates": 128}
    stages = [Measured("read", "stages", [0.001], pairs=100, share_of_roof=0.25)]
    cold = [Measured("edje rerank", "cold", [2.0], pairs=100), Measured("of it: open", "cold", [1])]
    top10 = benchmark_json([Measured("cascade", "top10", [0.1, 0.3], pairs=1000)])
    return {
        "stages": benchmark_json(stages, conditions=where),
        "candidates": benchmark_json([rank("candidates", n) for n in (100, 50_000)]),
        "images": benchmark_json([rank("images", n) for n in (10_000, 10_000_000)]),
        "top10": {**top10, "result": {"share_equal": 1.0}},
        "cold": benchmark_json(cold),
    }


def test_every_result_has_its_block():
    text = section({"peers": peers(), **suite()})
    for said in (
        "| **edje, auto** | **400** | **200** | **16.0** |",
        "| Hugging Face, as evaluated | 25.0 | 12.5 | 1.0 |",
        "| MaxSim over the same store (another function) | 9,000 | 4,500 | 360.0 |",
        "| lmdb[records=256] | 25,600 |",
        "| read | 10.00 | 1.000 | 1.000 | 25% |",
        "100: 2,500, 50,000: 2,500 (0.0% between the least and the most)",
        "cascade 200 / 298",
        "2.00 s (open 1.00; full-size scorer",
        "[cold.json](perf/results/cold.json)",
    ):
        assert said in text, said


def test_the_chart_leaves_out_who_computes_another_function():
    [panel] = panels({"peers": peers()})
    shown = {bar.label: bar.kind for bar in panel.bars}
    assert shown == {
        "edje, auto": "ours",
        "OpenVINO int8": "library",
        "Hugging Face, as evaluated": "peer",
    }
    assert panel.base == "Hugging Face, as evaluated"
    assert chart_digest({"peers": peers()}) != chart_digest({})


def test_only_what_stands_between_the_markers_is_replaced():
    text = f"# a\n{BEGIN}\nold\n{END}\n# b\n"
    new = replaced(text, "new")
    assert new == f"# a\n{BEGIN}\n\nnew\n\n{END}\n# b\n"
    assert replaced(new, "new") == new
    for wrong in ("# a", f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"):
        with pytest.raises(EdjeError, match=r"README\.md needs one"):
            replaced(wrong, "new")


def test_the_command_writes_both_and_then_finds_no_difference(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    results.mkdir()
    (results / "peers.json").write_text(json.dumps(peers()))
    path = tmp_path / "README.md"
    path.write_text(f"{BEGIN}\n{END}\n")
    for name, value in {"README": path, "RESULTS": results}.items():
        monkeypatch.setattr(readme, name, value)
    monkeypatch.setattr(readme, "load", lambda: load(results))
    assert readme.main(["--check"]) == 1
    assert "run `python -m edje.perf.readme`" in capsys.readouterr().err
    assert readme.main([]) == 0
    assert "edje, auto" in path.read_text()
    assert readme.main(["--check"]) == 0
