"""The benchmark of int8 tokens on the tiny model: what is compared, judged and said."""

import json
from dataclasses import replace

import numpy as np
import pytest

from capabilities import needs_int8
from edje.bundle import BundleManifest
from edje.engines.fidelity import FidelityLimits
from edje.engines.precision.prepare import Recipe
from edje.errors import EdjeError
from edje.perf import bench_fidelity as bench
from edje.perf.random_model import full_size, image_id, random_tokens, write_store

NUM_IMAGES = 24
IDS = [image_id(number) for number in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def demo(tiny_bundle, tmp_path_factory):
    """What the benchmark reads of a finished demo, over random tokens."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "calibration").mkdir()
    (folder / "bundle").symlink_to(tiny_bundle)
    manifest = BundleManifest.read(tiny_bundle)
    tokens = random_tokens(NUM_IMAGES, manifest.sizes)
    lines = [
        json.dumps({"query": text, "target": IDS[3], "candidates": IDS[number:]})
        for number, text in enumerate(("a dog", "two cats", "a red kite", "no", "a bird"))
    ]
    for place in (folder, folder / "calibration"):
        encoder = manifest.fingerprint_encoder
        write_store(place / "scenes.store", tokens, encoder=encoder).close()
        (place / "queries.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@needs_int8
def test_every_way_to_read_int8_tokens_ranks_the_queries(demo, tmp_path, monkeypatch):
    small = replace(full_size(), num_tokens=4, hidden=8)
    monkeypatch.setattr(bench, "full_size", lambda: small)
    for name, value in (("BACKEND", "onnxruntime"), ("NUM_RECORDS", 40), ("GATHERED", 16)):
        monkeypatch.setattr(bench, name, value)
    result = bench.measure_tokens(demo, None, tmp_path, print)
    rows, gather = result["rows"], result["gather"]
    assert list(rows) == list(bench.TOKENS)
    assert rows[bench.FLOAT16_TOKENS]["max_abs_diff"] == 0
    dequantised, taken = rows["fp32, int8 tokens dequantised"], rows["fp32, int8 tokens"]
    for row in (dequantised, taken):
        assert 0 < row["max_abs_diff"] < 0.5
        assert row["num_pairs"] == sum(NUM_IMAGES - number for number in range(5))
    # The graph multiplies in float32, the gather rounds to float16.
    assert abs(dequantised["mean_abs_diff"] - taken["mean_abs_diff"]) < 0.01
    assert [row["name"] for row in gather["records"]][1:] == [bench.AS_STORED, bench.DEQUANTISED]
    assert set(gather["bytes_an_image"]) == {"float16", "int8"}
    assert bench.FLOAT16_TOKENS in bench.summary(json.loads(json.dumps(result)))


@pytest.mark.parametrize(
    ("name", "loss", "broken"),
    [
        ("fp32, int8 tokens", 0.2, False),
        ("fp32, int8 tokens", 0.21, True),
        ("fp32, int8 tokens dequantised", 0.3, True),
        ("int8, int8 tokens", 0.3, False),
    ],
)
def test_only_what_the_tokens_lose_is_judged(name, loss, broken):
    assert bench.loses_too_much(name, {"loss_of_r1_points": loss}) is broken


def test_lost_points_are_counted_against_the_reference():
    first, second = np.array([2, 1], np.float32), np.array([1, 2], np.float32)
    scores = {"exact": [first, first], "other": [first, second]}
    rows = bench.compare(scores, [0, 0], "exact")
    assert rows["other"]["loss_of_r1_points"] == 50
    assert rows["other"]["top_1"] == 0.5
    with pytest.raises(EdjeError, match="knows its target"):
        bench.compare(scores, [None, None], "exact")


def test_every_precision_is_scored_as_its_graph(demo, tmp_path, monkeypatch):
    searched = [name for name in bench.EMULATED if "rest" in name]  # for minutes
    for name in searched:
        monkeypatch.delitem(bench.EMULATED, name)
    impossible = FidelityLimits(min_kendall_tau=1.0)
    refused = Recipe("fp8", "float32", limits=impossible)
    monkeypatch.setattr(bench, "FOR_REAL", ())
    monkeypatch.setitem(bench.EMULATED, "never", refused)
    result = bench.measure_precisions(demo, 2, tmp_path, print)
    assert "does not hold the fidelity limits" in result["plans"].pop("never")["refused"]
    monkeypatch.delitem(bench.EMULATED, "never")
    graphs = [f"{name} (graph)" for name in (*bench.EMULATED, *bench.UNBOUND)]
    assert list(result["rows"]) == [bench.REFERENCE, *graphs]
    assert result["rows"][bench.REFERENCE]["kendall_tau"] == 1
    assert 0 < result["rows"]["fp16 (graph)"]["max_abs_diff"] < 0.1
    assert set(result["plans"]) == {"bf16", "fp16", *bench.UNBOUND}
    assert result["broken"] == []  # nothing kept is measured, not judged
    said = bench.summary(result)
    assert "int8, nothing kept: static scales, kept 0 of 8" in said
    assert "int8 token scales, nothing kept: dynamic scales, kept 0 of 6, never attention" in said
    assert "bf16: all in bfloat16" in said
    json.dumps(result)
