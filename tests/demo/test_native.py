"""Native engines of the demo's trained model: as near to float32 as their graphs are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.bundle import BundleManifest
from edje.demo import tiny_model
from edje.demo.evaluation import FirstStage, samples
from edje.engines.builder.build import build_engine
from edje.engines.contract import Batch
from edje.engines.manifest import Profile
from edje.engines.precision.emulate import scorer
from edje.engines.precision.graph import Graph
from edje.engines.samples import sample_batches
from edje.export.export import export_bundle
from native_engine import EIGHT_BIT_BUCKETS, EightBits, native_scorer, prepared

NUM_IMAGES, NUM_CANDIDATES = 16, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    checkpoint, language_model, vision_model = tiny_model.write_checkpoint(folder / "checkpoint")
    export_bundle(checkpoint, language_model, folder / "bundle", vision_model=vision_model)
    build_engine(folder / "bundle", folder / "fp16", backend="native", precision="fp16")
    return folder / "bundle"


@pytest.fixture(scope="module")
def batch(bundle: Path, folder: Path) -> Batch:
    """A caption and the images that come next to it."""
    (folder / "pairs").mkdir()
    pairs = samples(bundle, folder / "pairs", FirstStage(tiny_model.load()), NUM_IMAGES)
    text, first = BundleManifest.read(bundle).text, next(iter(pairs))
    few, profile = replace(first, tokens=first.tokens[:NUM_CANDIDATES]), EIGHT_BIT_BUCKETS[-1:]
    (found,) = sample_batches(few, Profile(64, profile), pad_id=text.pad_id, sep_id=text.sep_id)
    return found


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_engine_is_as_faithful_as_its_graph(
    bundle: Path, folder: Path, batch: Batch, interpreted: Any, kind: str
) -> None:
    source = Graph.read(bundle / "joint_encoder.onnx")
    graph = prepared(source, kind)
    builds = EightBits(BundleManifest.read(bundle), folder, folder / "fp16", interpreted)
    score = builds.scorer(builds.built(graph, kind, kind), kind, (9, 0))
    with score.device.current():
        found = np.asarray(score(batch))
    exact, emulated = (scorer(each)(batch) for each in (source, graph))
    error, expected = (float(np.abs(each - exact).mean()) for each in (found, emulated))
    assert error <= 1.5 * expected + 1e-2
    assert error <= {"int8": 2e-3, "fp8": 1.5e-2}[kind] * float(np.ptp(exact))
    assert found.argmax() == exact.argmax()


def test_float16_scores_the_trained_model_as_float32_does(
    bundle: Path, folder: Path, batch: Batch, interpreted: Any
) -> None:
    with native_scorer(folder / "fp16", interpreted, max_pairs=NUM_CANDIDATES) as score:
        found = np.asarray(score(batch))
    exact = scorer(Graph.read(bundle / "joint_encoder.onnx"))(batch)
    np.testing.assert_allclose(found, exact, atol=1e-2)  # of scores that span 22
    assert np.array_equal(np.argsort(-found), np.argsort(-exact))
