"""The lean PyTorch scorer gives the float32 bundle's scores."""

import numpy as np
import pytest
import torch

from edje.bundle import BundleManifest
from edje.engines.contract import Batch
from edje.engines.fidelity import reference_scorer
from edje.perf.scorers import load_scorer

TOLERANCE = 1e-4


@pytest.mark.parametrize("num_wordpieces", [1, 13, 61])
def test_it_matches_the_float32_bundle(tiny_bundle, num_wordpieces):
    manifest = BundleManifest.read(tiny_bundle)
    random = np.random.default_rng(num_wordpieces)
    ids = random.integers(0, manifest.sizes.vocab_size, (3, num_wordpieces + 2)).astype(np.int32)
    shape = (7, manifest.sizes.num_tokens, manifest.sizes.hidden)
    tokens = random.standard_normal(shape).astype(np.float16)
    asks = np.array([0, 2, 1, 1, 0, 2, 2], np.int32)
    lengths = np.full(3, num_wordpieces + 2, np.int32)
    expected = reference_scorer(tiny_bundle)(Batch(ids, lengths, asks, tokens))
    with torch.inference_mode():
        arrays = (torch.from_numpy(array) for array in (ids, asks, tokens))
        found = load_scorer(tiny_bundle)(*arrays).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert np.ptp(expected) > 10 * TOLERANCE  # else any constant would do
