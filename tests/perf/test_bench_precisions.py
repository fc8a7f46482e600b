"""The precision benchmark's own parts: who is compared, what is refused, what is said."""

import json

import numpy as np
import pytest

from edje.errors import EdjeError
from edje.perf import bench_precisions as bench

EXPECTED = np.linspace(-1, 1, 32, dtype=np.float32)
NAMES = {"int8": bench.FAST, "ov32": "openvino fp32", "official": bench.OFFICIAL}


def scorers(**scores):
    found = {NAMES[key]: (lambda value=value: value) for key, value in scores.items()}
    return {**found, bench.FLOAT32: lambda: EXPECTED}


def test_float32_must_agree_and_int8_must_follow():
    noise = np.random.default_rng(0).normal(0, 0.05, 32).astype(np.float32)
    facts = bench.check_scores(scorers(int8=EXPECTED + noise, official=EXPECTED + 5e-5))
    assert facts[bench.FAST]["correlation"] > 0.99
    assert 0 < facts[bench.FAST]["kendall_tau"] < 1
    assert facts[bench.FLOAT32] == {"max_abs_diff": 0.0, "correlation": 1.0, "kendall_tau": 1.0}
    nans = np.full(32, np.nan, np.float32)
    with pytest.raises(EdjeError) as caught:
        bench.check_scores(scorers(int8=-EXPECTED, ov32=EXPECTED + 2e-4, official=nans))
    at_fault = {fault.split(":")[0] for fault in caught.value.faults}
    assert at_fault == {bench.FAST, "openvino fp32", bench.OFFICIAL}


def test_contestants_are_compared_in_turns_and_the_ratios_said():
    found = scorers(int8=EXPECTED, ov32=EXPECTED, official=EXPECTED)
    result = bench.compare(found, len(EXPECTED), 2)
    speeds = {timing["name"]: timing["pairs_per_s"] for timing in result["timings"]}
    assert list(speeds) == list(found)
    assert all(timing["num_runs"] == 2 for timing in result["timings"])
    for name, ratio in result["speedup_of_openvino_int8"].items():
        assert ratio == pytest.approx(speeds[bench.FAST] / speeds[name], abs=1e-3)
    without = bench.compare(scorers(ov32=EXPECTED), len(EXPECTED), 1)
    assert without["speedup_of_openvino_int8"] == {}
    where = {"cpu": "X", "cores": 2, "threads": "all", "wordpieces": 13, "text_slots": 16}
    ratios = {bench.FLOAT32: 3.5, bench.OFFICIAL: 6.0}
    whole = {
        "conditions": {**where, "load_average": [0.5], "commit": "abc"},
        "left_out": {"openvino bf16": "no bf16"},
        "batch_32": {**result, "speedup_of_openvino_int8": ratios},
        "batch_256": without,
    }
    text = bench.summary(json.loads(json.dumps(whole)))
    assert "batches of 32: openvino int8 reaches 3.50 times" in text
    assert "6.00 times the pairs/s of Hugging Face fp32 (expected: 5.5 or more)" in text
    assert "batches of 256" not in text
    assert "openvino bf16 was not measured: no bf16" in text
