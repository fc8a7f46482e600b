"""The benchmark's own parts on the tiny model: the same code, seconds instead of minutes."""

import json

import numpy as np
import pytest

from edje.engines.builder.build import build_engine
from edje.engines.manifest import EngineManifest
from edje.errors import EdjeError
from edje.perf import bench_end_to_end as bench
from edje.perf import random_model
from edje.runtime.store import TokenStore
from edje.runtime.text import QueryTokenizer

QUERY = "two red circles above a blue square"
SETTINGS = bench.Settings(num_candidates=40, num_wordpieces=7, num_rounds=2, num_threads=1)


@pytest.fixture(scope="module")
def engines(tiny_bundle, tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    for backend in ("openvino", "onnxruntime"):
        build_engine(tiny_bundle, root / backend, backend=backend, precision="fp32")
    return root


@pytest.fixture(scope="module")
def request_of_both(engines, tmp_path_factory):
    bundle = EngineManifest.read(engines / "openvino").bundle
    tokens = np.random.default_rng(0).standard_normal((40, 64, 32)).astype(np.float16)
    ids = [f"{index}.png" for index in range(40)]
    path = tmp_path_factory.mktemp("store") / "store"
    store = TokenStore.create(
        path, num_tokens=64, hidden=32, fingerprint_encoder=bundle.fingerprint_encoder
    )
    store.append(ids, tokens)
    store.close()
    queries = QueryTokenizer.open(engines / "openvino", bundle.text)([QUERY])
    text_ids = np.zeros((1, 23), np.int32)
    text_ids[0, : queries.text_length[0]] = queries.text_ids[0, : queries.text_length[0]]
    return bench.Request(QUERY, ids, path, text_ids, tokens)


def test_rank_is_compared_with_the_bare_library(engines, request_of_both):
    result = bench.compare_with_bare(engines / "openvino", request_of_both, SETTINGS)
    names = [timing["name"] for timing in result["timings"]]
    assert names == [
        "Reranker.rank",
        "bare OpenVINO, a stream a core, batches of 16",
        "bare OpenVINO, one stream, batches of 16",
        "bare OpenVINO, one stream, batches of 256",
    ]
    assert result["best_bare"] in names[1:]
    assert result["max_abs_diff"] < 1e-4
    assert result["share_of_bare"] > 0
    assert json.dumps(result)


def test_engines_are_compared(engines, request_of_both):
    folders = [engines / "openvino", engines / "onnxruntime"]
    result = bench.compare_engines(folders, request_of_both, SETTINGS)
    assert [timing["name"] for timing in result["timings"]] == ["openvino fp32", "onnxruntime fp32"]
    assert result["max_abs_diff"] < 1e-4
    assert result["expected_speedup"] is None


def test_contestants_that_disagree_stop_the_benchmark():
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    nans = np.full(3, np.nan, np.float32)
    with pytest.raises(EdjeError, match="disagree") as caught:
        bench.check_agreement({"a": lambda: zeros, "b": lambda: ones, "c": lambda: nans}, 1e-3)
    assert [fault[0] for fault in caught.value.faults] == ["b", "c"]


def test_the_summary_says_what_was_not_measured():
    result = {
        "conditions": {
            "cpu": "A CPU",
            "cores": 2,
            "threads": "all",
            "candidates": 512,
            "wordpieces": 13,
            "load_average": [0.1],
            "commit": "abc",
        },
        "rank_against_bare_openvino": {"share_of_bare": 0.991, "best_bare": "bare"},
        "openvino_against_onnxruntime": {
            "timings": [{"name": "openvino fp32"}, {"name": "onnxruntime fp32"}],
            "speedup": 1.21,
            "why_no_bf16": "no such units",
        },
    }
    text = bench.summary(result)
    assert "99.1% of bare" in text
    assert "openvino fp32 reaches 1.21 times" in text
    assert "bf16 was not measured: no such units" in text


def test_the_random_checkpoint_is_the_full_size_scorer():
    shapes = random_model._tensor_shapes()
    scorer = [name for name in shapes if name.startswith("language_model.bert.")]
    assert len(scorer) == 5 + 12 * 16
    assert shapes["language_model.bert.embeddings.word_embeddings.weight"] == (30523, 384)
    layer = "language_model.bert.encoder.layer.11."
    assert shapes[layer + "intermediate.dense.weight"] == (1536, 384)
    assert len(random_model.query_of(13).split()) == 13
