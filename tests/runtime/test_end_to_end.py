"""The official model through the whole online path: the official scores, and damage on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from edje import EngineError, Reranker, StoreError, TokenStore
from edje.engines.builder.build import build_engine
from edje.engines.builder.options import EngineOptions
from edje.engines.manifest import MANIFEST
from edje.runtime.results import EngineLabel
from waiting import stream_threads

# float32 engines against float32 PyTorch; seen: 2e-6.
TOLERANCE = 1e-4
# int8 tokens against float16 ones, scores that span 1.3; seen: 6e-3. And the gather rounds what it
# dequantises to float16, the graph does not; seen: 2e-4.
INT8_TOLERANCE, ROUNDING_TOLERANCE = 3e-2, 2e-3
NUM_IMAGES = 12
IDS = [f"img-{i}" for i in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def raw_text_engine(tiny_engine, tmp_path_factory):
    """The official scores are of raw captions, so this engine does not canonicalise."""
    folder = tmp_path_factory.mktemp("raw") / "engine"
    shutil.copytree(tiny_engine, folder)
    values = json.loads((folder / MANIFEST).read_text())
    values["bundle"]["text"]["normalization"] = "none"
    (folder / MANIFEST).write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def captions(official_tiny):
    return json.loads((official_tiny / "captions.json").read_text())["captions"]


@pytest.fixture(scope="module")
def official_scores(official_tiny):
    return np.load(official_tiny / "expected.npz")["scores_from_fp16_tokens"]


@pytest.fixture(scope="module")
def reranker(raw_text_engine, tiny_store):
    with Reranker.open(raw_text_engine, store=tiny_store, num_threads=1) as reranker:
        yield reranker


def test_ranked_scores_are_the_official_ones(reranker, captions, official_scores):
    for caption, expected in zip(captions, official_scores, strict=True):
        result = reranker.rank(caption, IDS)
        scores = np.empty(NUM_IMAGES, np.float32)
        for hit in result:
            scores[hit.index] = hit.score
        assert np.abs(scores - expected).max() < TOLERANCE
        assert [hit.score for hit in result] == sorted(scores.tolist(), reverse=True)
        assert result.engine == EngineLabel("openvino", "fp32", "host")


def test_only_the_caption_beyond_61_wordpieces_is_reported_truncated(reranker, captions):
    truncated = [reranker.rank(caption, IDS[:1]).truncated for caption in captions]
    assert truncated == [len(caption.split()) > 61 for caption in captions]
    assert any(truncated)


def test_predicted_scores_of_mixed_captions_are_the_official_ones(
    reranker, captions, official_scores
):
    rng = np.random.default_rng(0)
    asked = rng.integers(len(captions), size=100)
    shown = rng.integers(NUM_IMAGES, size=100)
    pairs = [(captions[q], IDS[i]) for q, i in zip(asked, shown, strict=True)]
    assert np.abs(reranker.predict(pairs) - official_scores[asked, shown]).max() < TOLERANCE


@pytest.fixture(scope="module")
def precise_engine(tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("precise") / "engine"
    build_engine(tiny_bundle, folder, backend="onnxruntime", precision="fp32")
    return folder


def test_a_cascade_of_two_real_engines_returns_the_precise_top_k(
    tiny_engine, precise_engine, tiny_store
):
    with (
        Reranker.open(precise_engine, store=tiny_store) as alone,
        Reranker.open(
            tiny_engine, store=tiny_store, rescore=precise_engine, rescore_margin=1e-3
        ) as cascade,
    ):
        expected = alone.rank("a dog", top_k=3)
        result = cascade.rank("a dog", top_k=3)
    assert [hit.id for hit in result] == [hit.id for hit in expected]
    scores = [[hit.score for hit in hits] for hits in (result, expected)]
    assert np.allclose(*scores, atol=1e-6)
    assert result.engine == EngineLabel("openvino", "fp32", "host")
    assert result.rescoring.engine == EngineLabel("onnxruntime", "fp32", "host")


@pytest.fixture(scope="module")
def int8_store(tiny_store, tmp_path_factory):
    """`tiny_store` with int8 tokens."""
    folder = tmp_path_factory.mktemp("int8") / "store"
    with TokenStore.open(tiny_store) as store:
        sizes = dict(zip(("num_tokens", "hidden"), store.record_shape, strict=True))
        sizes["fingerprint_encoder"] = store.fingerprint_encoder
        tokens = np.empty((NUM_IMAGES, *store.record_shape), np.float16)
        store.read(store.rows(IDS), tokens)
    with TokenStore.create(folder, dtype="int8", **sizes) as store:
        store.append(IDS, tokens)
    return folder


def test_int8_tokens_score_alike_dequantised_or_taken_as_they_are(
    tiny_bundle, precise_engine, tiny_store, int8_store, tmp_path
):
    options = EngineOptions(token_dtype="int8")
    build_engine(
        tiny_bundle, tmp_path / "int8", backend="onnxruntime", precision="fp32", options=options
    )
    scores = []
    for engine, store, tokens in (
        (precise_engine, tiny_store, "float16"),
        (precise_engine, int8_store, "int8"),
        (tmp_path / "int8", int8_store, "int8"),
    ):
        with Reranker.open(engine, store=store) as reranker:
            assert reranker.rank("a dog").engine.tokens == tokens
            scores.append(reranker.predict([("a dog", image_id) for image_id in IDS]))
    exact, dequantised, taken = scores
    assert 0 < np.abs(dequantised - exact).max() < INT8_TOLERANCE
    assert np.abs(dequantised - taken).max() < ROUNDING_TOLERANCE


def test_open_refuses_a_cascade_without_a_margin_and_leaves_nothing_open(
    tiny_engine, precise_engine, tiny_store
):
    others = stream_threads()
    with pytest.raises(EngineError, match="no margin can be learned"):
        Reranker.open(tiny_engine, store=tiny_store, rescore=precise_engine)
    assert stream_threads() <= others


def test_open_closes_what_it_opened_when_a_part_does_not_fit(raw_text_engine, tmp_path):
    other = tmp_path / "other"
    TokenStore.create(other, num_tokens=64, hidden=32, fingerprint_encoder="b" * 64).close()
    with pytest.raises(StoreError, match="was not made for this engine"):
        Reranker.open(raw_text_engine, store=other)
    TokenStore.open(other, mode="a").close()


def test_open_names_a_missing_engine(tiny_store, tmp_path):
    with pytest.raises(EngineError, match="it does not exist"):
        Reranker.open(tmp_path / "none", store=tiny_store)


def test_reranking_from_the_shell_never_imports_training_libraries(tiny_engine, tiny_store):
    code = (
        "import sys; from edje.runtime.cli.app import main; assert main(sys.argv[1:]) == 0;"
        "print('loaded', *sys.modules)"
    )
    args = ("rerank", tiny_engine, "--store", tiny_store, "--query", "a dog")
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.partition("loaded ")[2].split())
    assert {"openvino", "edje.runtime.reranker"} <= loaded
    assert not loaded & {"torch", "transformers", "onnx"}
