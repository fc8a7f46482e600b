"""The precision benchmark's own parts: who is compared, what is refused, what is said."""

import json
from pathlib import Path

import numpy as np
import pytest

from edje.engines.builder.build import build_engine
from edje.engines.contract import Batch
from edje.errors import EdjeError
from edje.export.export import export_bundle
from edje.perf import bench_precisions as bench
from edje.perf import random_model
from edje.perf import scorers as official_scorer
from edje.perf.harness import Timing

EXPECTED = np.linspace(-1, 1, 32, dtype=np.float32)


@pytest.fixture
def small_model(monkeypatch, tmp_path):
    """The random model with two layers, width 48 and few words; only sizes differ."""
    sizes = {
        "HIDDEN": 48,
        "NUM_LAYERS": 2,
        "NUM_HEADS": 4,
        "INTERMEDIATE": 96,
        "NUM_WORDS": 60,
        "NUM_POSITIONS": 160,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(random_model, name, value)
    checkpoint, language_model = random_model.write_checkpoint(tmp_path)
    export_bundle(checkpoint, language_model, tmp_path / "bundle")
    return tmp_path / "bundle"


def batch_of(num_pairs: int) -> Batch:
    random = np.random.default_rng(0)
    text_ids = np.zeros((1, 15), np.int32)
    text_ids[0, :9] = [2, *random.integers(5, 60, 7), 3]
    tokens = random.standard_normal((num_pairs, 64, 48)).astype(np.float16)
    length = np.array([9], np.int32)
    return Batch(text_ids, length, np.zeros(num_pairs, np.int32), tokens)


def test_the_official_scorer_gives_the_scores_of_the_exported_graph(small_model, tmp_path):
    build_engine(small_model, tmp_path / "engine", backend="onnxruntime", precision="fp32")
    engine = bench.open_engine(tmp_path / "engine")
    batch = batch_of(12)
    scores = bench.engine_scorer(engine, [batch])()
    engine.close()
    expected = official_scorer.official_scorer()(batch)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=bench.FLOAT32_TOLERANCE)
    assert expected.std() > 10 * bench.FLOAT32_TOLERANCE


def scorers(**scores):
    names = {"int8": bench.FAST, "ov32": "openvino fp32", "official": bench.OFFICIAL}
    found = {names[key]: (lambda value=value: value) for key, value in scores.items()}
    return {**found, bench.FLOAT32: lambda: EXPECTED}


def test_float32_must_agree_and_int8_must_follow():
    noise = np.random.default_rng(0).normal(0, 0.05, 32).astype(np.float32)
    facts = bench.check_scores(scorers(int8=EXPECTED + noise, official=EXPECTED + 5e-5))
    assert facts[bench.FAST]["correlation"] > 0.99
    assert 0 < facts[bench.FAST]["kendall_tau"] < 1
    assert facts[bench.FLOAT32] == {"max_abs_diff": 0.0, "correlation": 1.0, "kendall_tau": 1.0}
    with pytest.raises(EdjeError) as caught:
        bench.check_scores(scorers(int8=-EXPECTED, ov32=EXPECTED + 2e-4))
    assert [fault.split(":")[0] for fault in caught.value.faults] == [bench.FAST, "openvino fp32"]


def test_scores_that_are_not_numbers_are_a_disagreement():
    with pytest.raises(EdjeError):
        bench.check_scores(scorers(ov32=np.full(32, np.nan, np.float32)))


def test_the_ratios_are_those_of_the_least_times():
    timings = {
        name: Timing(name, 32, ms, 2 * ms, ms, 32e3 / ms, 3)
        for name, ms in {bench.FAST: 100.0, bench.FLOAT32: 350.0, bench.OFFICIAL: 600.0}.items()
    }
    assert bench.speedups(timings) == {bench.FAST: 1.0, bench.FLOAT32: 3.5, bench.OFFICIAL: 6.0}
    del timings[bench.FAST]
    assert bench.speedups(timings) == {}


def test_what_was_measured_and_what_was_not_is_said():
    where = {"cpu": "X", "cores": 2, "threads": "all", "wordpieces": 13, "text_slots": 16}
    ratios = {bench.FLOAT32: 3.5, bench.OFFICIAL: 6.0}
    result = {
        "conditions": {**where, "load_average": [0.5], "commit": "abc"},
        "left_out": {"openvino bf16": "no bf16"},
        "batch_32": {"speedup_of_openvino_int8": ratios},
        "batch_256": {"speedup_of_openvino_int8": {}},
    }
    text = bench.summary(result)
    assert "batches of 32: openvino int8 reaches 3.50 times" in text
    assert "6.00 times the pairs/s of Hugging Face fp32 (expected: 5.5 or more)" in text
    assert "batches of 256" not in text
    assert "openvino bf16 was not measured: no bf16" in text


def test_contestants_are_compared_in_turns_and_written_as_json(capsys):
    found = scorers(int8=EXPECTED, ov32=EXPECTED, official=EXPECTED)
    result = bench.compare(found, len(EXPECTED), 2)
    assert [timing["name"] for timing in result["timings"]] == list(found)
    assert all(timing["num_runs"] == 2 for timing in result["timings"])
    assert set(result["speedup_of_openvino_int8"]) == set(found)
    assert json.dumps(result)
    assert bench.FAST in capsys.readouterr().out


def test_the_batch_holds_the_query_that_was_asked_for(built: Path):
    batch = bench.make_batch(built, bench.Settings(5, 2, 1, None))
    assert len(batch) == 5
    assert batch.text_length.tolist() == [4]
    assert np.count_nonzero(batch.text_ids) == 4


@pytest.fixture
def built(small_model, tmp_path):
    folder = tmp_path / "built"
    build_engine(small_model, folder, backend="onnxruntime", precision="fp32")
    return folder
