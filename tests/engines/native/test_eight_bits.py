"""8-bit engines score as their prepared graph does: every kind, kept groups, any batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.bundle import BundleManifest
from edje.engines.contract import BuildJob, BuildOptions
from edje.engines.manifest import EngineManifest, Profile
from edje.engines.native import backend
from edje.engines.native.plan import Plan
from edje.engines.native.run import NativeEngine
from edje.engines.native.weights import read_weights
from edje.engines.precision.dynamic import quantize_dynamic
from edje.engines.precision.emulate import scorer
from edje.engines.precision.graph import Graph
from edje.engines.precision.lower import lower
from native_engine import HostScorer, random_batch
from recording_device import RecordingDevice

KINDS = ("int8", "fp8")
BUCKETS = (15, 23, 63)
# What reading one value one step off moves scores by, with everything quantised; 16 bit as in
# `test_scores`.
TOLERANCE = {"int8": 2e-2, "fp8": 6e-2}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> BundleManifest:
    return BundleManifest.read(tiny_bundle)


@pytest.fixture(scope="module")
def source(tiny_bundle: Path) -> Graph:
    return Graph.read(tiny_bundle / "joint_encoder.onnx")


class EightBits:
    """Builds engines of prepared graphs, and opens them on pretended GPUs."""

    def __init__(self, bundle: BundleManifest, folder: Path, like: Path, interpreted: Any):
        self._bundle, self._folder, self._interpreted = bundle, folder, interpreted
        self._manifest = EngineManifest.read(like)

    def built(self, graph: Graph, precision: str, name: str) -> Path:
        """Build a prepared graph; return the folder."""
        out = self._folder / name
        out.mkdir()
        path = out / "graph.onnx"
        graph.write(path)
        profile, options = Profile(64, BUCKETS), BuildOptions()
        job = BuildJob(
            path, out, precision, "float16", profile, self._bundle, options, lambda _: None
        )
        backend.build(job)
        return out

    def scorer(self, folder: Path, precision: str, capability: tuple[int, int]) -> Any:
        """Return what scores host batches on a device of this compute capability."""
        device = RecordingDevice(None, kernels=self._interpreted)
        device.compute_capability = capability
        plan = replace(Plan.read(folder), max_pairs=4)
        manifest = replace(self._manifest, precision=precision)
        return HostScorer(NativeEngine(manifest, plan, read_weights(folder), device), device)


@pytest.fixture
def eight_bits(
    bundle: BundleManifest, tmp_path: Path, native_folder: Any, interpreted: Any
) -> EightBits:
    return EightBits(bundle, tmp_path, native_folder(), interpreted)


def prepared(graph: Graph, kind: str, keep: tuple[str, ...] = ()) -> Graph:
    return lower(quantize_dynamic(graph, kind, keep=keep), "float16")


def with_outliers(graph: Graph) -> Graph:
    """Make two channels behind every norm large, as trained encoders have them."""
    planted = graph.replaced(graph.nodes)
    for name in graph.weights:
        if name.startswith("layers.") and name.endswith("norm.weight"):
            values = graph.array(name).copy()
            values[[3, 8]] *= 40
            planted.set_weight(name, values)
    return planted


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "keep",
    [
        (),
        ("layers.0.qkv", "layers.1.ffn1"),
        ("layers.0.ffn2", "layers.1.qkv"),
        ("layers.0.ffn1", "layers.1.ffn2"),
    ],
    ids=lambda keep: "-".join(keep) or "all",
)
def test_scores_are_those_of_the_prepared_graph(
    eight_bits: EightBits,
    source: Graph,
    bundle: BundleManifest,
    kind: str,
    keep: tuple[str, ...],
    capability: tuple[int, int],
) -> None:
    graph = prepared(source, kind, keep)
    folder = eight_bits.built(graph, kind, "engine")
    plan = Plan.read(folder)
    assert plan.kind == kind
    assert not {*keep} & {*plan.quantized}
    assert len(plan.quantized) == 3 * plan.num_layers - len(keep)
    expected, score = scorer(graph), eight_bits.scorer(folder, kind, capability)
    with score.device.current():
        for seed, bucket in enumerate(BUCKETS):
            batch = random_batch(bundle, bucket, 2 + seed, seed)
            found = score(batch)
            print(kind, keep, bucket, np.abs(found - expected(batch)).max(), np.ptp(found))
            np.testing.assert_allclose(found, expected(batch), atol=TOLERANCE[kind])
