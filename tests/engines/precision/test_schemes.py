"""Scales found while running: the search, the plan, and a backend that asks for them."""

from dataclasses import replace

import numpy as np
import pytest

from capabilities import needs_int8
from edje.engines.builder.build import build_engine
from edje.engines.fidelity import FidelityLimits
from edje.engines.precision.emulate import emulated, runner
from edje.engines.precision.graph import Graph
from edje.engines.precision.prepare import GraphCache, Recipe, prepare_graph
from edje.engines.precision.schemes import DynamicScales, Observed
from edje.engines.precision.search import choose
from edje.engines.precision.static import find_linears
from edje.engines.registry import load_backend, open_engine
from edje.engines.scales import Scales
from edje.errors import EngineError

from .conftest import PROFILE, with_outliers

QUANTIZED = [f"layers.{layer}.{part}" for layer in (0, 1) for part in ("qkv", "ffn1", "ffn2")]


# As the native backend says them.
DYNAMIC = Scales("dynamic", never={"attention_output": "made head by head"})


def search(graph, queries, precision="int8", tau=-1.0, scales=(DYNAMIC,)):
    limits = FidelityLimits(min_kendall_tau=tau)
    return choose(graph, queries, precision, "float32", limits, lambda _: None, scales=scales)


def test_where_channels_stand_out_it_agrees_better_than_static_scales(graph, queries):
    planted = with_outliers(graph)
    static, dynamic = (
        search(planted, queries, scales=(scales,)).agreement for scales in (Scales(), DYNAMIC)
    )
    assert dynamic.mean_abs_diff < 0.7 * static.mean_abs_diff
    assert dynamic.kendall_tau > static.kendall_tau


def test_there_is_nothing_to_try_but_smoothing(graph, queries):
    planted = with_outliers(graph)
    free = search(planted, queries).agreement.kendall_tau
    chosen = search(planted, queries, tau=free + 0.4 * (1 - free))
    ways = [tried["method"] for tried in chosen.facts["tried"] if "kept" not in tried]
    assert ways == ["scales found while running", "scales found while running, smoothed"]
    assert 0 < len(chosen.kept) < len(QUANTIZED)
    assert list(chosen.facts["kept"]) == list(chosen.kept)
    left = {linear.group for linear in find_linears(chosen.graph)}
    assert left == {*chosen.kept, "layers.0.attention_output", "layers.1.attention_output"}


def test_only_what_is_quantised_is_smoothed(graph, queries):
    planted, kept = with_outliers(graph), ("layers.0.ffn1", "layers.1.qkv")
    scheme = DynamicScales(planted, "int8", "float32", Observed(planted, queries[0]), DYNAMIC)
    quantized = scheme.quantized("smoothed", scheme.methods[0], kept)
    left = {linear.group for linear in find_linears(quantized)}
    assert left == {*kept, "layers.0.attention_output", "layers.1.attention_output"}
    named = [node.name.split("/") for node in quantized.nodes if "/smooth/" in node.name]
    smoothed = {f"{layer}.{part.replace('query', 'qkv')}" for _, layer, part, *_ in named}
    assert smoothed
    assert not smoothed & left
    assert len(smoothed) == len(scheme.outliers(kept)) < len(scheme.outliers())


def test_the_last_layers_query_rounds_its_rows_as_key_and_value_do(graph, queries):
    planted = with_outliers(graph)
    scheme = DynamicScales(planted, "int8", "float32", Observed(planted, queries[0]), DYNAMIC)
    quantized = scheme.quantized("smoothed", scheme.methods[0])
    np.testing.assert_array_equal(
        quantized.array("layers.1.query.smooth"), quantized.array("layers.1.key.smooth")
    )
    products = {node.name: node for node in quantized.nodes if node.op_type == "MatMul"}
    read = [products[f"/layers.1/{part}/MatMul"].input[0] for part in ("query", "key", "value")]
    assert read[0] != read[1] == read[2]
    rows, every = runner(emulated(quantized), read[:2])(queries[0][0])
    np.testing.assert_array_equal(rows.reshape(len(every), -1), every[:, 0])


def test_limits_that_nothing_holds_are_refused(graph, queries):
    with pytest.raises(EngineError, match="does not hold the fidelity limits"):
        search(graph, queries, precision="fp8", tau=1.0)


def test_a_plan_says_where_scales_come_from_and_what_is_never_quantised(
    source, bundle, samples, tmp_path
):
    recipe = Recipe("int8", "float16", "int8", samples, FidelityLimits(), (DYNAMIC,))
    plan = prepare_graph(source, tmp_path / "graph.onnx", recipe, bundle, PROFILE)
    assert plan["scales"] == "dynamic"
    assert plan["quantized"] == QUANTIZED
    assert plan["activations"] == (
        "int8, symmetric, one scale per token and 128 columns, found while running"
    )
    assert plan["weights"] == "int8, symmetric, one scale per output channel and 128 inputs"
    assert set(plan["never_quantized"]) == {"attention_output"}
    assert "dynamic" in plan["float32"]
    assert plan["method"] == "scales found while running"


def test_both_kinds_of_scales_have_graphs_of_their_own_and_others_are_refused(
    source, bundle, samples, tmp_path
):
    cache = GraphCache(tmp_path / "graphs")
    plans = []
    for scales in (Scales(), DYNAMIC, Scales()):
        recipe = Recipe("fp8", "float32", "float16", samples, FidelityLimits(), (scales,))
        with cache.prepared(source, recipe, bundle, PROFILE, lambda _: None) as (graph, plan):
            plans.append(plan)
            kinds = {node.op_type for node in Graph.read(graph).nodes}
            assert ("QuantizeLinear" in kinds) == (scales == Scales())
    assert plans[0] is plans[2]
    with pytest.raises(EngineError, match="'sometimes', expected static or dynamic"):
        prepare_graph(
            source,
            tmp_path / "graph.onnx",
            Recipe("int8", "float32", calibration=samples, scales=(Scales("sometimes"),)),
            bundle,
            PROFILE,
        )


@needs_int8
def test_a_backend_that_asks_for_them_gets_them(tiny_bundle, samples, tmp_path, monkeypatch):
    asked = []
    backend = load_backend("onnxruntime")
    offered = [replace(DYNAMIC, weight_bits=7)]  # no CPU's sums of these overflow
    monkeypatch.setattr(backend, "activation_scales", lambda p, s: asked.append((p, s)) or offered)
    arguments = {"backend": "onnxruntime", "precision": "int8", "calibration": samples}
    manifest = build_engine(tiny_bundle, tmp_path / "engine", **arguments)
    assert asked == [("int8", manifest.bundle.sizes)]
    assert manifest.precision_plan["scales"] == "dynamic"
    open_engine(tmp_path / "engine").close()
    plan = manifest.precision_plan["agreement"]
    assert np.isclose(manifest.fidelity["kendall_tau"], plan["kendall_tau"], atol=0.02)
    assert "int8 of 7 bits" in manifest.precision_plan["weights"]
