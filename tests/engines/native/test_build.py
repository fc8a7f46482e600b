"""Native engines are built without a GPU, for every architecture, and say what they cannot run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.bundle import BundleManifest
from edje.engines.build_options import BuildOptions
from edje.engines.builder.build import build_engine
from edje.engines.builder.options import EngineOptions
from edje.engines.contract import BuildJob
from edje.engines.manifest import EngineManifest, Profile, rebuild_command
from edje.engines.native.build import make_plan
from edje.engines.native.plan import PLAN, Plan, graph_sizes
from edje.engines.native.weights import WEIGHTS, read_weights
from edje.engines.precision.graph import Graph
from edje.errors import EngineError
from edje.kernels.tuning import tuned_capabilities

WORDS = "embeddings.word.weight"
STEPS = {"qkv", "attention_output", "ffn1", "ffn2"}


def test_one_engine_serves_every_architecture(native_folder: Any) -> None:
    manifest, plan = EngineManifest.read(native_folder()), Plan.read(native_folder())
    assert manifest.device["compute_capabilities"] == list(tuned_capabilities())
    assert plan.tiles.keys() == set(tuned_capabilities())
    assert all(tiles.keys() == STEPS for tiles in plan.tiles.values())
    assert {PLAN, WEIGHTS} <= manifest.files.keys()
    assert manifest.fidelity["emulated"]["kendall_tau"] > 0.99


def test_it_is_built_for_the_gpus_that_are_asked_for(tiny_bundle: Path, tmp_path: Path) -> None:
    options = EngineOptions(backend_options=BuildOptions(compute_capabilities=("9.0", "8.6")))
    manifest = build_engine(
        tiny_bundle, tmp_path / "e", backend="native", precision="fp16", options=options
    )
    assert manifest.device["compute_capabilities"] == ["9.0", "8.6"]
    assert Plan.read(tmp_path / "e").tiles.keys() == {"9.0", "8.6"}
    command = rebuild_command(manifest.to_json(), tmp_path / "e")
    assert "--compute-capability 9.0 --compute-capability 8.6" in command


def test_the_report_says_what_each_kernel_takes(tiny_bundle: Path, tmp_path: Path) -> None:
    options = EngineOptions(backend_options=BuildOptions(report=True))
    build_engine(tiny_bundle, tmp_path / "e", backend="native", precision="fp16", options=options)
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    assert report["kernels"].keys() == set(tuned_capabilities())
    for rows in report["kernels"].values():
        assert {row["step"] for row in rows} >= STEPS
        assert all(row["spill_bytes"] == 0 < row["registers"] for row in rows)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_padding_is_zero_and_weights_are_the_graphs(
    native_folder: Any, tiny_bundle: Path, precision: str
) -> None:
    plan, weights = Plan.read(native_folder(precision)), read_weights(native_folder(precision))
    graph = Graph.read(tiny_bundle / "joint_encoder.onnx")
    ffn1 = weights["layers.0.ffn1.weight"]
    assert ffn1.shape == (plan.wide, plan.width)
    rounded = graph.array("layers.0.ffn1.weight").T
    if precision == "fp16":
        inside = ffn1[: plan.intermediate, : plan.hidden]
        assert inside.tobytes() == rounded.astype(np.float16).tobytes()
    outside = ffn1.copy()
    outside[: plan.intermediate, : plan.hidden] = 0
    assert not outside.any()
    heads = weights["layers.1.qkv.bias"].reshape(3, plan.num_heads, plan.head)
    assert not heads[..., plan.hidden // plan.num_heads :].any()
    key = graph.array("layers.1.key.bias").reshape(plan.num_heads, -1)
    np.testing.assert_array_equal(heads[1, :, : key.shape[1]], key)
    for name in ("layers.1.ffn_norm.weight", "layers.1.ffn_norm.bias"):  # float32, as exported
        np.testing.assert_array_equal(weights[name][: plan.hidden], graph.array(name))
    np.testing.assert_array_equal(weights["embeddings.words"], graph.array(WORDS))


def job_for(bundle: Path, **sizes: int) -> BuildJob:
    """Return a job whose bundle says it had other sizes."""
    manifest = BundleManifest.read(bundle)
    return BuildJob(
        bundle / "joint_encoder.onnx",
        bundle,
        "fp16",
        "float16",
        Profile(256, (15, 63)),
        replace(manifest, sizes=replace(manifest.sizes, **sizes)),
        BuildOptions(),
        lambda _: None,
    )


def test_what_the_kernels_cannot_run_is_said_at_once(tiny_bundle: Path) -> None:
    job = job_for(tiny_bundle, hidden=1032, num_heads=12)
    with pytest.raises(EngineError) as raised:
        make_plan(job, Graph.read(job.graph), ["9.0"], "float16")
    assert [fault.split(":")[0] for fault in raised.value.faults] == ["heads", "hidden"]


def test_larger_batches_go_in_parts(tiny_bundle: Path) -> None:
    job = job_for(tiny_bundle)
    job = replace(job, profile=Profile(5000, (15,)))
    assert make_plan(job, Graph.read(job.graph), ["9.0"], "float16").max_pairs == 1024


@pytest.mark.parametrize("most", [1, 2, 3, 4, 100, 256, 1000])
def test_graphs_are_few_and_at_most_half_empty(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
    assert len(sizes) <= 11
    for count in range(1, most + 1):
        assert min(size for size in sizes if size >= count) < 2 * count or count == 1


def test_a_damaged_plan_or_file_of_weights_is_named(native_folder: Any, tmp_path: Path) -> None:
    values = json.loads((native_folder() / PLAN).read_text())
    del values["hidden"]
    (tmp_path / PLAN).write_text(json.dumps(values))
    with pytest.raises(EngineError, match=r"plan\.json cannot be read") as raised:
        Plan.read(tmp_path)
    assert raised.value.faults == ("hidden: missing",)
    (tmp_path / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(EngineError, match=r"weights\.safetensors cannot be read"):
        read_weights(tmp_path)
