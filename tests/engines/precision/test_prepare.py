"""From a recipe to a graph and its plan: limits, the search, int8 tokens, refusals."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from edje.bundle import INPUTS
from edje.engines.fidelity import FidelityLimits
from edje.engines.precision.emulate import runner, scorer
from edje.engines.precision.graph import Graph
from edje.engines.precision.lower import lower
from edje.engines.precision.prepare import GraphCache, Recipe, prepare_graph, take_int8_tokens
from edje.engines.precision.search import choose
from edje.engines.precision.static import find_linears
from edje.engines.samples import RandomSamples, int8_batch
from edje.errors import EngineError

from .conftest import PROFILE


@pytest.fixture
def prepare(source, bundle, tmp_path):
    """Prepare a recipe; return plan and graph."""

    def prepare(*recipe, **more):
        out = tmp_path / "graph.onnx"
        plan = prepare_graph(source, out, Recipe(*recipe, **more), bundle, PROFILE)
        return plan, Graph.read(out)

    return prepare


def test_float32_is_the_bundles_own_file_and_a_plan_says_what_stays_so(prepare, source, tmp_path):
    plan, _ = prepare("fp32", "float32")
    assert plan == {"compute_type": "float32"}
    assert (tmp_path / "graph.onnx").read_bytes() == source.read_bytes()
    plan, _ = prepare("fp16", "float16")
    assert plan["compute_type"] == "float16"
    assert "LayerNormalization statistics" in plan["float32"]
    assert all(plan["float32"].values())


def test_a_plan_says_how_it_was_calibrated(prepare, samples):
    free = FidelityLimits()
    plan, graph = prepare("int8", "float16", calibration=samples, limits=free)
    assert plan["method"] in ("max", "percentile 99.99", "mse")
    assert plan["calibration_data"] == samples.data
    assert plan["calibration_random"] is False
    assert {f"layers.{i}.{kind}" for i in (0, 1) for kind in ("qkv", "ffn1", "ffn2")} <= set(
        plan["quantized"]
    )
    assert len(plan["tried"]) >= 3
    assert all(0 < found["kendall_tau"] <= 1 for found in plan["tried"])
    assert list(find_linears(graph)) == []


def test_quantising_needs_pairs_and_random_ones_are_marked_and_hold_no_limits(prepare, bundle):
    for precision in ("int8", "fp8"):
        with pytest.raises(EngineError, match="needs pairs to calibrate") as caught:
            prepare(precision, "float32")
        assert "--calibration-random" in caught.value.hint
    never = FidelityLimits(min_kendall_tau=1.0, max_top1_change=0.0)
    plan, _ = prepare("int8", "float32", calibration=RandomSamples(bundle, 2, 8), limits=never)
    assert plan["calibration_random"] is True
    assert plan["kept"] == {}


def search(graph, queries, tau):
    limits = FidelityLimits(min_kendall_tau=tau)
    return choose(graph, queries, "fp8", "float32", limits, lambda _: None)


def test_the_search_keeps_no_more_than_it_must(graph, queries):
    free = search(graph, queries, -1.0)
    assert free.kept == ()
    limit = free.agreement.kendall_tau + 0.4 * (1 - free.agreement.kendall_tau)
    held = search(graph, queries, limit)
    assert held.agreement.kendall_tau >= limit > free.agreement.kendall_tau
    assert 0 < len(held.kept) < 8
    assert list(held.facts["kept"]) == list(held.kept)
    kept = held.facts["kept"].values()
    gains = [fact["mean_abs_diff"] ** 2 / fact["share_of_products"] for fact in kept]
    assert gains == sorted(gains, reverse=True)
    assert {linear.group for linear in find_linears(held.graph)} == set(held.kept)
    fewer = [t for t in held.facts["tried"] if t.get("kept", 0) == len(held.kept) - 1]
    assert all(found["kendall_tau"] < limit for found in fewer)


def test_limits_that_nothing_holds_are_refused_with_the_figures(graph, queries):
    with pytest.raises(EngineError, match="does not hold the fidelity limits") as caught:
        search(graph, queries, 1.0)
    assert "the limit is 1" in caught.value.faults[0]
    assert "fp16" in caught.value.hint


def test_builds_that_differ_in_the_backend_share_one_calibration(source, bundle, samples, tmp_path):
    told = []
    cache = GraphCache(tmp_path / "graphs")
    recipe = Recipe("int8", "float32", calibration=samples)
    for _ in range(2):
        with cache.prepared(source, recipe, bundle, PROFILE, told.append) as (graph, plan):
            assert graph.is_file()
            assert plan["quantized"]
    assert len(told) == len(set(told))


@pytest.mark.parametrize("element", ["float32", "float16"])
def test_int8_tokens_score_as_their_float_values(graph, queries, element):
    typed = graph if element == "float32" else lower(graph, element)
    stored = int8_batch(queries[0][0])
    values = stored.visual_tokens.astype(np.float32) * stored.visual_scales[..., None]
    exact = replace(stored, visual_tokens=values.astype(np.float16), visual_scales=None)
    variant = take_int8_tokens(typed)
    assert [value.name for value in variant.inputs] == [*INPUTS, "visual_scales"]
    found = scorer(variant)(stored)
    # The products are exact in float32, the float16 tokens round them once.
    np.testing.assert_allclose(found, scorer(typed)(exact), rtol=0, atol=5e-3)
    np.testing.assert_allclose(found, runner(graph)(queries[0][0])[0], rtol=0, atol=0.1)


def test_what_is_no_graph_is_refused_and_without_onnx_it_says_what_to_install(
    source, tmp_path, monkeypatch
):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"not a graph")
    with pytest.raises(EngineError, match="cannot be read as ONNX"):
        Graph.read(bad)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EngineError, match="needs onnx") as caught:
        Graph.read(source)
    assert caught.value.hint == "pip install 'edje-runtime[build]'"
