"""The cascade's benchmark on the tiny model: what is compared, counted and said."""

import json

import numpy as np
import pytest

from edje.engines.builder.build import build_engine
from edje.engines.manifest import MANIFEST, EngineManifest
from edje.perf import bench_cascade as bench
from edje.runtime.store import TokenStore

NUM_IMAGES = 60
IDS = [f"{index:02}.png" for index in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def engines(tiny_bundle, tmp_path_factory):
    """Two float32 engines; the one that plays the fast one claims real pairs."""
    root = tmp_path_factory.mktemp("cascade")
    build_engine(tiny_bundle, root / "precise", backend="onnxruntime", precision="fp32")
    build_engine(tiny_bundle, root / "fast", backend="openvino", precision="fp32")
    manifest = json.loads((root / "fast" / MANIFEST).read_text())
    manifest["fidelity"] |= {"random": False, "max_underrating": 1e-3}
    (root / "fast" / MANIFEST).write_text(json.dumps(manifest))
    return root


@pytest.fixture(scope="module")
def store(engines, tmp_path_factory):
    bundle = EngineManifest.read(engines / "fast").bundle
    path = tmp_path_factory.mktemp("store") / "store"
    tokens = np.random.default_rng(0).standard_normal((NUM_IMAGES, 64, 32)).astype(np.float16)
    with TokenStore.create(
        path, num_tokens=64, hidden=32, fingerprint_encoder=bundle.fingerprint_encoder
    ) as store:
        store.append(IDS, tokens)
    return path


def test_the_cascade_is_compared_with_both_engines_on_every_query(engines, store):
    queries = [bench.Query("a dog", IDS), bench.Query("two cats above a red circle", IDS[5:])]
    lines = []
    result = bench.measure(queries, store, engines / "precise", engines / "fast", lines.append)
    assert result["num_queries"] == 2
    assert result["share_equal"] == 1.0
    assert result["max_score_diff"] < 1e-5
    assert set(result["pairs_per_s"]) == {bench.PRECISE, bench.FAST, bench.CASCADE}
    assert bench.TOP_K / NUM_IMAGES <= result["mean_share_rescored"] < 1
    assert result["conditions"]["engines"][bench.PRECISE].startswith("onnxruntime")
    assert json.loads(json.dumps(result))["conditions"]["candidates"] == NUM_IMAGES
    text = bench.summary(result)
    assert "on 100.00% of 2 queries" in text
    assert f"{result['speedup']:.2f} times" in text


def test_another_top_k_is_counted_and_fails_the_benchmark(monkeypatch, tmp_path, capsys):
    result = {"share_equal": 0.5}
    monkeypatch.setattr(bench, "run_benchmark", lambda *_: result)
    monkeypatch.setattr(bench, "summary", lambda _: "half of them")
    monkeypatch.chdir(tmp_path)
    assert bench.main(["demo-out"]) == 1
    assert json.loads((tmp_path / ".cache/perf/cascade.json").read_text()) == result
    assert "half of them" in capsys.readouterr().out
    result["share_equal"] = 1.0
    assert bench.main(["demo-out"]) == 0


def test_a_folder_that_no_demo_wrote_ends_in_one_sentence(tmp_path, capsys):
    assert bench.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
