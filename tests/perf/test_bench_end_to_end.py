"""The benchmark's own parts on a small model: the same code, seconds instead of minutes."""

import json

import numpy as np
import pytest

from edje.engines.builder.build import build_engine
from edje.errors import EdjeError
from edje.perf import bench_end_to_end as bench

NAMES = [
    "Reranker.rank",
    "bare OpenVINO, a stream a core, batches of 16",
    "bare OpenVINO, one stream, batches of 16",
    "bare OpenVINO, one stream, batches of 256",
]


def test_both_comparisons_are_measured_and_said(small_model, tmp_path, monkeypatch):
    def build(bundle, backend, precision, progress):
        folder = tmp_path / f"{backend}-fp32"  # of any precision: few CPUs have bf16
        if not folder.exists():
            build_engine(bundle, folder, backend=backend, precision="fp32")
        return folder

    for name, value in (("NUM_CANDIDATES", 40), ("NUM_WORDPIECES", 7), ("full_size_engine", build)):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "full_size_bundle", lambda: small_model)
    result = json.loads(json.dumps(bench.measure(2, 1, tmp_path, print)))
    overhead = result["rank_against_bare_openvino"]
    assert [timing["name"] for timing in overhead["timings"]] == NAMES
    assert overhead["best_bare"] in NAMES[1:]
    assert overhead["max_abs_diff"] < 1e-4
    assert overhead["share_of_bare"] > 0
    engines = result["openvino_against_onnxruntime"]
    assert [row["name"] for row in engines["timings"]] == ["openvino fp32", "onnxruntime fp32"]
    assert engines["max_abs_diff"] < 1e-4
    assert engines["expected_speedup"] is None
    engines["why_no_bf16"] = "no such units"
    text = bench.summary(result)
    assert f"{overhead['share_of_bare']:.1%} of {overhead['best_bare']}" in text
    assert f"openvino fp32 reaches {engines['speedup']:.2f} times" in text
    assert "bf16 was not measured: no such units" in text
    assert "candidates 40, wordpieces 7" in text


def test_the_query_has_the_wordpieces_that_it_shall_have(small_model, tmp_path, monkeypatch):
    build_engine(small_model, tmp_path / "engine", backend="onnxruntime", precision="fp32")
    pairs = bench.make_pairs(tmp_path / "engine", 5)
    assert np.count_nonzero(pairs.text_ids) == bench.NUM_WORDPIECES + 2
    assert [(len(b), b.text_length.tolist()) for b in pairs.batches(3)] == [(3, [15]), (2, [15])]
    monkeypatch.setattr(bench, "NUM_WORDPIECES", 62)
    with pytest.raises(EdjeError, match="the query has 61 wordpieces, not 62"):
        bench.make_pairs(tmp_path / "engine", 5)


def test_contestants_that_disagree_stop_the_benchmark():
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    nans = np.full(3, np.nan, np.float32)
    with pytest.raises(EdjeError, match="disagree") as caught:
        bench.check_agreement({"a": lambda: zeros, "b": lambda: ones, "c": lambda: nans}, 1e-3)
    assert [fault[0] for fault in caught.value.faults] == ["b", "c"]
