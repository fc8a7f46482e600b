"""The tiny bundle's graph, its official pairs as queries, and a runner of graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edje.bundle import JOINT_ENCODER, BundleManifest
from edje.engines.contract import Batch
from edje.engines.manifest import Profile
from edje.engines.precision.emulate import runner
from edje.engines.precision.graph import Graph
from edje.engines.samples import RandomSamples, sample_batches

PROFILE = Profile(64, (15, 31, 63))


class RealSamples(RandomSamples):
    """Random pairs that pass for real ones: limits hold for them."""

    random = False


@pytest.fixture(scope="session")
def bundle(tiny_bundle: Path) -> BundleManifest:
    return BundleManifest.read(tiny_bundle)


@pytest.fixture(scope="session")
def samples(bundle: BundleManifest) -> RealSamples:
    return RealSamples(bundle, 4, 16)


@pytest.fixture(scope="session")
def queries(samples: RealSamples, bundle: BundleManifest) -> list[list[Batch]]:
    sep = bundle.text.sep_id
    return [list(sample_batches(s, PROFILE, pad_id=0, sep_id=sep)) for s in samples]


@pytest.fixture(scope="session")
def source(tiny_bundle: Path) -> Path:
    return tiny_bundle / JOINT_ENCODER


@pytest.fixture
def graph(source: Path) -> Graph:
    return Graph.read(source)


@pytest.fixture(scope="session")
def run() -> Callable[[Graph, Batch], np.ndarray]:
    """Score one batch with a float32 graph in ONNX Runtime."""
    return lambda graph, batch: runner(graph)(batch)[0]


def with_outliers(graph, gain=40.0):
    """Make channels large as trained encoders have them."""
    planted = graph.replaced(graph.nodes)
    for name in graph.weights:
        if name.startswith("layers.") and name.endswith("norm.weight"):
            values = graph.array(name).copy()
            values[[3, 8]] *= gain
            planted.set_weight(name, values)
    return planted
