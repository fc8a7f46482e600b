"""int8 with scales found while running in OpenVINO: the pass's scores, to the bit in any batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from capabilities import needs_openvino_int8
from edje.bundle import JOINT_ENCODER, BundleManifest
from edje.engines import openvino as ov
from edje.engines.builder.build import build_engine
from edje.engines.contract import OpenOptions
from edje.engines.manifest import EngineManifest
from edje.engines.openvino_core import openvino_core
from edje.engines.openvino_graph import quantize_while_running, why_not_dynamic
from edje.engines.precision.emulate import scorer
from edje.engines.precision.graph import Graph
from edje.engines.precision.prepare import Recipe, prepare_graph
from edje.engines.registry import load_backend, open_engine
from edje.engines.samples import RandomSamples
from edje.engines.scales import Scales
from edje.errors import EngineError

GROUP = 32  # what divides the fixture's 32 and 64 columns
PAIRS = [(caption, image) for caption in range(5) for image in range(12)]
pytestmark = needs_openvino_int8


@pytest.fixture(scope="module")
def samples(tiny_bundle: Path) -> RandomSamples:
    return RandomSamples(BundleManifest.read(tiny_bundle), num_queries=2, num_candidates=8)


@pytest.fixture(scope="module")
def folder(
    tiny_bundle: Path, samples: RandomSamples, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("dynamic") / "engine"
    backend, offered = load_backend("openvino"), ov.activation_scales
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(backend, "activation_scales", lambda *asked: offered(*asked)[1:])
        build_engine(tiny_bundle, out, backend="openvino", precision="int8", calibration=samples)
    return out


def test_it_scores_as_the_emulation_and_every_pair_alike_in_any_batch(
    folder, tiny_bundle, official_pairs, run, samples, tmp_path
):
    bundle, source = BundleManifest.read(tiny_bundle), tiny_bundle / JOINT_ENCODER
    offered = ov.activation_scales("int8", bundle.sizes)[1:]
    recipe = Recipe("int8", "float32", calibration=samples, scales=offered)
    prepared = tmp_path / "graph.onnx"
    prepare_graph(source, prepared, recipe, bundle, EngineManifest.read(folder).profile)
    batch = official_pairs.batch(PAIRS, 63)
    expected, exact = (scorer(Graph.read(graph))(batch) for graph in (prepared, source))
    engine = open_engine(folder)
    found = run(engine, batch)
    # Nearly all to float32's last digits; a value at the border of two steps may fall either way.
    apart = np.abs(found - expected)
    assert np.median(apart) < 1e-5
    assert apart.mean() < 0.2 * np.abs(found - exact).mean()
    for size in (1, 7):
        parts = [batch.part(slice(start, start + size)) for start in range(0, len(batch), size)]
        again = np.concatenate([run(engine, part) for part in parts])
        assert again.tobytes() == found.tobytes()
    engine.close()


def test_the_manifest_says_the_scales_and_the_group(folder):
    manifest = EngineManifest.read(folder)
    assert manifest.build_options["dynamic_quantization_group_size"] == GROUP
    plan = manifest.precision_plan
    assert plan["scales"] == "dynamic"
    assert "one scale per token and 32 columns" in plan["activations"]
    assert "layers.0.attention_output" in plan["quantized"]
    assert plan["never_quantized"] == {}
    assert manifest.hides_nan  # so that readers look for NaN in the tokens themselves


def test_offered_are_static_scales_first_and_only_groups_that_divide_the_model(tiny_bundle):
    sizes = BundleManifest.read(tiny_bundle).sizes
    kinds = [(each.kind, each.block) for each in ov.activation_scales("int8", sizes)]
    assert kinds == [("static", Scales().block), ("dynamic", GROUP)]
    full = replace(sizes, hidden=384, intermediate=1536)
    offered = ov.activation_scales("int8", full)
    assert [each.block for each in offered[1:]] == [128, 64, 32]
    costs = [each.cost for each in offered]
    assert costs == sorted(costs)
    assert costs[-1] < 1
    odd = ov.activation_scales("int8", replace(sizes, hidden=300))
    assert [each.kind for each in odd] == ["static"]


def test_a_group_that_the_plugin_would_skip_in_silence_is_found_out(tiny_bundle):
    full = replace(BundleManifest.read(tiny_bundle).sizes, hidden=384, intermediate=1536)
    exact = ((ov.PRECISION_KEY, "f32"),)
    assert why_not_dynamic(full, 128, exact) is None
    odd = replace(full, hidden=300, intermediate=600)
    assert "not quantise products of 300 by 300" in str(why_not_dynamic(odd, 300, exact))
    assert "not both multiples of 128" in str(why_not_dynamic(replace(full, hidden=96), 128))
    fault = str(why_not_dynamic(full, 128, (("NO_SUCH_SETTING", "1"),)))
    assert "NO_SUCH_SETTING" in fault


@pytest.mark.parametrize("key", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_without_vnni_in_onednn_they_are_not_offered_and_not_opened(
    folder, tiny_bundle, monkeypatch, key
):
    monkeypatch.setenv(key, "avx2")
    sizes = BundleManifest.read(tiny_bundle).sizes
    assert [each.kind for each in ov.activation_scales("int8", sizes)] == ["static"]
    with pytest.raises(EngineError, match=f"cannot be here: {key}=avx2 keeps VNNI"):
        open_engine(folder)


def test_settings_that_would_turn_them_off_are_refused(folder):
    for settings, said in (
        ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}, "cannot be set at opening"),
        ({"INFERENCE_PRECISION_HINT": "bf16"}, "cannot be set at opening"),
    ):
        with pytest.raises(EngineError, match=said):
            open_engine(folder, OpenOptions(backend_settings=settings))


def test_a_graph_without_the_pass_is_left_as_it_is(tiny_bundle):
    model = openvino_core().read_model(tiny_bundle / JOINT_ENCODER)
    before = [node.get_friendly_name() for node in model.get_ordered_ops()]
    assert quantize_while_running(model) is None
    assert [node.get_friendly_name() for node in model.get_ordered_ops()] == before


def test_tokens_that_are_not_finite_do_not_touch_other_pairs(folder, official_pairs, run):
    batch = official_pairs.batch(PAIRS, 63)
    engine = open_engine(folder)
    right = run(engine, batch)
    spoilt = batch.visual_tokens.copy()
    spoilt[3, 5, 7], spoilt[8] = np.nan, np.inf
    found = run(engine, replace(batch, visual_tokens=spoilt))
    others = [pair for pair in range(len(batch)) if pair not in (3, 8)]
    assert found[others].tobytes() == right[others].tobytes()
    engine.close()
