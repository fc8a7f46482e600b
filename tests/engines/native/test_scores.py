"""A native engine computes the bundle's scores, in every bucket and for every size of batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.bundle import BundleManifest
from edje.engines.builder.build import build_engine
from edje.engines.contract import Batch
from edje.engines.precision.emulate import scorer
from edje.engines.precision.graph import Graph
from native_engine import HostScorer, opened


@pytest.fixture(scope="module")
def folder(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "engine"
    build_engine(tiny_bundle, out, backend="native", precision="fp16")
    return out


def random_batch(bundle: BundleManifest, bucket: int, num_pairs: int, seed: int) -> Batch:
    rng, sizes = np.random.default_rng(seed), bundle.sizes
    num_queries = int(rng.integers(1, 4))
    lengths = rng.integers(2, bucket + 1, num_queries).astype(np.int32)
    ids = np.zeros((num_queries, bucket), np.int32)
    for row, length in enumerate(lengths):
        ids[row, :length] = rng.integers(0, sizes.vocab_size, length)
    shape = num_pairs, sizes.num_tokens, sizes.hidden
    tokens = rng.standard_normal(shape, np.float32).astype(np.float16)
    return Batch(ids, lengths, rng.integers(0, num_queries, num_pairs).astype(np.int32), tokens)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_it_scores_as_float32_does(
    folder: Path, tiny_bundle: Path, interpreted: Any, capability: tuple[int, int]
) -> None:
    bundle = BundleManifest.read(tiny_bundle)
    exact = scorer(Graph.read(tiny_bundle / "joint_encoder.onnx"))
    with opened(folder, interpreted, capability=capability, max_pairs=8) as (engine, device):
        scores = HostScorer(engine, device)
        for seed, bucket in enumerate(engine.manifest.profile.text_buckets):
            batch = random_batch(bundle, bucket, 3 * seed + 1, seed)
            found = scores.score(batch)
            np.testing.assert_allclose(found, exact(batch), atol=2e-3, rtol=0)
