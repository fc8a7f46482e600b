"""Engines of the first layers score as their cut graph does, whole layers and a linear head."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.bundle import BundleManifest
from edje.engines.native.plan import PLAN, Plan
from edje.engines.native.weights import read_weights
from edje.engines.precision.calibrate import observe, smooth
from edje.engines.precision.dynamic import dynamic_linears
from edje.engines.precision.emulate import scorer
from edje.engines.precision.graph import Graph
from edje.engines.precision.lower import lower_operands
from edje.engines.shallow.cut import Head, cut
from edje.errors import EngineError
from edje.export.export import export_bundle
from edje.kernels.layer_variants import shallow_score_name
from native_engine import EightBits, HostScorer, prepared, random_batch
from official_checkpoint import Sizes, write_checkpoint

BUCKETS = (15, 23, 31, 47, 63)
OTHER_BUCKETS = tuple(f", {bucket} text slots" for bucket in BUCKETS[1:])
# As those of the whole model in `test_scores` and `test_eight_bits`; the heads' scores spread as
# widely.
TOLERANCE = {"fp16": 6e-3, "bf16": 5e-2}
MOST = {"int8": 0.06, "fp8": 0.2}
ELEMENTS = {"fp16": "float16", "bf16": "bfloat16"}


def head_of(bundle: BundleManifest) -> Head:
    rng = np.random.default_rng(11)
    weight = rng.standard_normal(3 * bundle.sizes.hidden).astype(np.float32)
    return Head(weight / np.float32(bundle.sizes.hidden**0.5), 0.25)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> BundleManifest:
    return BundleManifest.read(tiny_bundle)


@pytest.fixture(scope="module")
def shallow(tiny_bundle: Path, bundle: BundleManifest) -> Graph:
    """The fixture model's first layer of two, float32."""
    return cut(Graph.read(tiny_bundle / "joint_encoder.onnx"), 1, head_of(bundle))


@pytest.fixture(scope="module")
def deep_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model bundle of four layers."""
    folder = tmp_path_factory.mktemp("deep")
    made = write_checkpoint(folder / "in", Sizes(hidden=48, num_layers=4))
    export_bundle(
        made.checkpoint, made.language_model, folder / "bundle", vision_model=made.vision_model
    )
    return folder / "bundle"


@pytest.fixture
def engines(
    bundle: BundleManifest, tmp_path: Path, native_folder: Any, interpreted: Any
) -> EightBits:
    return EightBits(bundle, tmp_path, native_folder(), interpreted, BUCKETS)


@contextmanager
def opened(
    engines: EightBits, folder: Path, precision: str, capability: tuple[int, int] = (9, 0)
) -> Iterator[HostScorer]:
    score = engines.scorer(folder, precision, capability)
    with score.device.current():
        yield score


@pytest.mark.parametrize(("precision", "capability"), [("fp16", (9, 0)), ("bf16", (8, 0))])
def test_scores_are_those_of_the_cut_graph_in_float32(
    engines: EightBits,
    shallow: Graph,
    bundle: BundleManifest,
    precision: str,
    capability: tuple[int, int],
) -> None:
    folder = engines.built(lower_operands(shallow, ELEMENTS[precision]), precision, "engine")
    exact = scorer(shallow)
    with opened(engines, folder, precision, capability) as score:
        for seed, bucket in enumerate(BUCKETS):
            batch = random_batch(bundle, bucket, 2 + seed, seed)
            expected = exact(batch)
            np.testing.assert_allclose(score(batch), expected, atol=TOLERANCE[precision])
            assert np.ptp(expected) > 20 * TOLERANCE["fp16"]
        ran = {launch.symbol for launch in score.device.launches}
    assert "shallow_score" in ran
    assert "score" not in ran


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bits_score_as_the_prepared_graph(
    engines: EightBits, shallow: Graph, bundle: BundleManifest, kind: str
) -> None:
    batch = random_batch(bundle, 23, 6, 2)
    seen = observe(shallow, [batch])
    # What no layer reads by its CLS rows alone needs no factors in common.
    own = {linear.value: seen[linear.value] for linear in dynamic_linears(shallow)}
    graph = prepared(smooth(shallow, own), kind)
    folder = engines.built(graph, kind, "engine")
    plan = Plan.read(folder)
    assert plan.quantized == ("layers.0.qkv", "layers.0.ffn1", "layers.0.ffn2")
    with opened(engines, folder, kind, (8, 9)) as score:
        assert np.abs(score(batch) - scorer(graph)(batch)).max() <= MOST[kind]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_three_layers_of_four(
    deep_bundle: Path, tmp_path: Path, native_folder: Any, interpreted: Any, precision: str
) -> None:
    bundle = BundleManifest.read(deep_bundle)
    source = Graph.read(deep_bundle / "joint_encoder.onnx")
    exact = cut(source, 3, head_of(bundle))
    graph = lower_operands(exact, "float16") if precision == "fp16" else prepared(exact, "int8")
    engines = EightBits(bundle, tmp_path, native_folder(), interpreted, (15, 31))
    folder, batch = engines.built(graph, precision, "engine"), random_batch(bundle, 31, 6, 5)
    plan = Plan.read(folder)
    assert (plan.num_layers, plan.num_whole_layers, len(plan.epsilons)) == (3, 3, 7)
    assert len(plan.quantized) == (0 if precision == "fp16" else 9)
    expected = scorer(exact if precision == "fp16" else graph)(batch)
    with opened(engines, folder, precision) as score:
        difference = np.abs(score(batch) - expected).max()
    assert difference <= (TOLERANCE | MOST)[precision]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_each_pair_has_its_own_score_in_every_batch(
    engines: EightBits, shallow: Graph, bundle: BundleManifest, precision: str
) -> None:
    graph = lower_operands(shallow, "float16") if precision == "fp16" else prepared(shallow, "int8")
    folder, whole = engines.built(graph, precision, "engine"), random_batch(bundle, 15, 6, 3)
    spoilt = whole.visual_tokens.copy()
    spoilt[1, 3, 5], spoilt[4] = np.nan, np.inf
    with opened(engines, folder, precision) as score:
        together = score(whole)  # in two parts: more pairs than run at once
        for size in (1, 2, 3):
            some = slice(2, 2 + size)
            assert score(whole.part(some)).tobytes() == together[some].tobytes()
        found = score(replace(whole, visual_tokens=spoilt))
        again = score(whole)
    assert np.isnan(found).tolist() == [False, True, False, False, True, False]
    sound = [0, 2, 3, 5]
    assert found[sound].tobytes() == together[sound].tobytes()
    assert again.tobytes() == together.tobytes()  # nothing of it stays in the engine's memory


def test_the_engine_holds_what_it_runs_and_no_more(
    engines: EightBits, shallow: Graph, bundle: BundleManifest, native_folder: Any
) -> None:
    folder = engines.built(lower_operands(shallow, "float16"), "fp16", "engine")
    plan, weights, hidden = Plan.read(folder), read_weights(folder), bundle.sizes.hidden
    assert (plan.num_layers, plan.shallow) == (1, True)
    head = weights["shallow.head.weight"]
    assert (head.dtype, head.shape) == (np.float32, (3, plan.width))
    assert head[:, :hidden].reshape(-1).tobytes() == head_of(bundle).weight.tobytes()
    assert not head[:, hidden:].any()
    assert weights["shallow.head.bias"].tolist() == [0.25]
    left = {name.split(".")[0] for name in weights}
    assert left == {"embeddings", "layers", "shallow"}
    assert not any(name.startswith("layers.1.") for name in weights)
    whole = Plan.read(native_folder())
    assert (whole.num_layers, whole.shallow) == (bundle.sizes.num_layers, False)


def test_the_report_counts_what_a_forward_launches(
    engines: EightBits, shallow: Graph, bundle: BundleManifest
) -> None:
    folder = engines.built(prepared(shallow, "int8", ("layers.0.qkv",)), "int8", "engine")
    rows = json.loads((folder / "report.json").read_text())["kernels"]["9.0"]
    assert rows[-1]["kernel"] == shallow_score_name("float16")
    assert all(row["spill_bytes"] == 0 < row["registers"] for row in rows)
    counted = sum(
        row["launches"]
        for row in rows
        if row["step"] != "assemble" and not row["step"].endswith(OTHER_BUCKETS)
    )
    with opened(engines, folder, "int8") as score:
        score(random_batch(bundle, 15, 2, 0))
        ran = [launch.symbol for launch in score.device.launches if launch.symbol != "assemble"]
    # Each bucket runs once, and once into each of its graphs: for 1, 2 and 4 pairs.
    assert len(ran) == len(BUCKETS) * 4 * counted


def test_a_stream_takes_what_it_says_it_takes(
    engines: EightBits, shallow: Graph, bundle: BundleManifest
) -> None:
    folder = engines.built(prepared(shallow, "int8"), "int8", "engine")
    batch = random_batch(bundle, 15, 2, 0)
    with opened(engines, folder, "int8") as score:
        before = score.device.usage().device_bytes
        score(batch)
        arrays = (batch.text_ids, batch.text_length, batch.query_of_pair, batch.visual_tokens)
        own = sum(array.nbytes for array in arrays) + 4 * len(batch)
        taken = score.device.usage().device_bytes - before - own
        assert 0.95 * taken < score.engine.bytes_a_stream <= taken


def test_a_plan_of_the_format_before_is_refused(native_folder: Any, tmp_path: Path) -> None:
    values = json.loads((native_folder() / PLAN).read_text())
    del values["shallow"]
    (tmp_path / PLAN).write_text(json.dumps(values | {"format_version": 1}))
    with pytest.raises(EngineError, match=r"plan\.json cannot be read") as raised:
        Plan.read(tmp_path)
    assert raised.value.hint == "build the engine again: edje build"
