"""The same promises on a real card: the compiled kernels, through cuda.core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.bundle import BundleManifest
from edje.engines.builder.build import build_engine
from edje.engines.contract import Batch, Engine
from edje.engines.fidelity import score_host_batch
from edje.engines.precision.emulate import scorer
from edje.engines.precision.graph import Graph
from edje.engines.registry import open_engine
from edje.perf import random_model
from native_engine import random_batch

pytestmark = pytest.mark.gpu
TOLERANCE = {"fp16": 1e-2, "bf16": 8e-2}


@pytest.fixture(scope="module")
def full_size() -> Path:
    """The bundle that `make gpu` measures with: exported once, random weights."""
    return random_model.full_size_bundle()


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def engine(
    request: pytest.FixtureRequest, full_size: Path, tmp_path_factory: Any
) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("native") / "engine"
    build_engine(full_size, folder, backend="native", precision=request.param)
    with closing(open_engine(folder)) as engine:
        yield engine


@pytest.fixture(scope="module")
def exact(full_size: Path) -> Callable[[Batch], np.ndarray]:
    return scorer(Graph.read(full_size / "joint_encoder.onnx"))


def test_every_bucket_scores_as_float32_does(engine: Engine, exact: Any, full_size: Path) -> None:
    bundle = BundleManifest.read(full_size)
    for seed, bucket in enumerate(engine.manifest.profile.text_buckets):
        batch = random_batch(bundle, bucket, 5 + seed, seed)
        found = score_host_batch(engine, batch)
        np.testing.assert_allclose(found, exact(batch), atol=TOLERANCE[engine.manifest.precision])


def test_a_pair_has_the_same_bits_in_every_batch(engine: Engine, full_size: Path) -> None:
    whole = random_batch(BundleManifest.read(full_size), 15, 256, 3)
    together = score_host_batch(engine, whole)
    for size in (1, 2, 17, 100, 200):
        some = slice(9, 9 + size)
        assert score_host_batch(engine, whole.part(some)).tobytes() == together[some].tobytes()


def test_tokens_that_are_not_finite_spoil_their_own_score_only(
    engine: Engine, full_size: Path
) -> None:
    batch = random_batch(BundleManifest.read(full_size), 23, 40, 5)
    spoilt = batch.visual_tokens.copy()
    spoilt[7, 1, 2] = np.nan
    found = score_host_batch(engine, replace(batch, visual_tokens=spoilt))
    right = score_host_batch(engine, batch)
    others = np.arange(40) != 7
    assert np.isnan(found[7])
    assert found[others].tobytes() == right[others].tobytes()
