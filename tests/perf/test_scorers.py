"""The scorers in PyTorch give the float32 bundle's scores; the random model is full-size."""

import numpy as np
import pytest
import torch

from edje.bundle import BundleManifest
from edje.engines.contract import Batch
from edje.engines.fidelity import reference_scorer
from edje.perf import random_model
from edje.perf.scorers import load_scorer, official_scorer

TOLERANCE = 1e-4


@pytest.mark.parametrize("num_wordpieces", [1, 13, 61])
def test_the_lean_scorer_matches_the_float32_bundle(tiny_bundle, num_wordpieces):
    manifest = BundleManifest.read(tiny_bundle)
    random = np.random.default_rng(num_wordpieces)
    ids = random.integers(0, manifest.sizes.vocab_size, (3, num_wordpieces + 2)).astype(np.int32)
    tokens = random_model.random_tokens(7, manifest.sizes)
    asks = np.array([0, 2, 1, 1, 0, 2, 2], np.int32)
    lengths = np.full(3, num_wordpieces + 2, np.int32)
    expected = reference_scorer(tiny_bundle)(Batch(ids, lengths, asks, tokens))
    with torch.inference_mode():
        arrays = (torch.from_numpy(array) for array in (ids, asks, tokens))
        found = load_scorer(tiny_bundle)(*arrays).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert np.ptp(expected) > 10 * TOLERANCE  # else any constant would do


def test_the_official_scorer_gives_the_scores_of_the_exported_graph(small_model):
    ids = np.zeros((1, 15), np.int32)
    ids[0, :9] = [2, *np.random.default_rng(0).integers(5, 60, 7), 3]
    sizes = BundleManifest.read(small_model).sizes
    batch = random_model.Pairs(7, ids, random_model.random_tokens(12, sizes)).batch(0, 12)
    expected = reference_scorer(small_model)(batch)
    np.testing.assert_allclose(official_scorer()(batch), expected, rtol=0, atol=TOLERANCE)
    assert expected.std() > 10 * TOLERANCE


def test_the_official_scorer_takes_tensors_and_another_type(small_model):
    """Half precision on the CPU: what the GPU step runs, but for the device."""
    sizes = BundleManifest.read(small_model).sizes
    ids = np.array([[2, 9, 8, 7, 3]], np.int32)
    pairs = random_model.Pairs(3, ids, random_model.random_tokens(4, sizes))
    length, asks = np.array([5], np.int32), np.zeros(4, np.int32)
    exact = official_scorer()(pairs.batch(0, 4))
    half = official_scorer(dtype="bfloat16")(
        Batch(ids, length, asks, torch.from_numpy(pairs.tokens))
    )
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, exact, atol=0.5)
    assert np.abs(half - exact).max() > 0


def test_the_random_checkpoint_is_the_full_size_scorer(tmp_path):
    checkpoint, _ = random_model.write_checkpoint(tmp_path)
    state = torch.load(checkpoint, weights_only=True, mmap=True)["model"]
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert sum(name.startswith("language_model.bert.") for name in shapes) == 5 + 12 * 16
    assert shapes["language_model.bert.embeddings.word_embeddings.weight"] == (30523, 384)
    layer = "language_model.bert.encoder.layer.11."
    assert shapes[f"{layer}intermediate.dense.weight"] == (1536, 384)
