"""Q/DQ: where it stands, what it holds, and the scales that calibration chooses."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import checker

from edje.engines.cpu import why_no_vnni
from edje.engines.precision.calibrate import (
    METHODS,
    Activations,
    amax_by,
    by_mse,
    observe,
    outlier_values,
    smooth,
)
from edje.engines.precision.emulate import Switches, scorer
from edje.engines.precision.graph import Graph, in_layers
from edje.engines.precision.lower import lower
from edje.engines.precision.static import LARGEST, find_linears, quantize
from edje.machine import is_x86

PRECISIONS = tuple(LARGEST)


@pytest.fixture(scope="module")
def seen(source, queries):
    return observe(Graph.read(source), [batch for query in queries for batch in query])


@pytest.fixture
def amax(seen):
    return amax_by("max", seen, "int8")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_linear_of_the_layers_is_quantised_and_nothing_else(graph, amax, precision):
    quantized = quantize(graph, precision, amax)
    checker.check_model(quantized.model(), full_check=True)
    assert find_linears(quantized) == []  # none reads a plain weight any more
    kinds = Counter(node.op_type for node in quantized.nodes)
    found = find_linears(graph)
    assert kinds["DequantizeLinear"] == len(found) + len({linear.value for linear in found})
    assert kinds["QuantizeLinear"] == len({linear.value for linear in found})
    for node in quantized.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert in_layers(node)
        if node.name.endswith(("/attention_scores/MatMul", "/context/MatMul")):
            assert not any("quantized" in name for name in node.input)


def test_query_key_and_value_share_one_quantiser(graph, amax):
    quantized = quantize(graph, "int8", amax)
    products = {node.name: node for node in quantized.nodes if node.op_type == "MatMul"}
    read = [products[f"/layers.0/{name}/MatMul"].input[0] for name in ("query", "key", "value")]
    assert len(set(read)) == 1


def test_int8_weights_have_a_scale_a_column_and_fp8_ones_one(graph, amax):
    int8, fp8 = (quantize(graph, precision, amax) for precision in ("int8", "fp8"))
    for linear in find_linears(graph):
        stored = int8.array(f"{linear.weight}.quantized")
        scale = int8.array(f"{linear.name}.weight.scale")
        weight = graph.array(linear.weight)
        assert (stored.dtype, scale.shape) == (np.int8, weight.shape[1:])
        assert np.abs(stored).max() <= 127
        assert (np.abs(stored * scale - weight) <= 0.501 * scale).all(), "half a step at most"
        assert fp8.array(f"{linear.weight}.quantized").dtype == "float8_e4m3fn"
        assert fp8.array(f"{linear.name}.weight.scale").shape == ()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_biases_embeddings_pooler_and_head_stay_as_they_are(graph, amax, precision):
    quantized = quantize(graph, precision, amax)
    changed = {linear.weight for linear in find_linears(graph)}
    for name in graph.weights.keys() - changed:
        np.testing.assert_array_equal(quantized.array(name), graph.array(name))
    assert {"layers.0.ffn1.bias", "pooler.weight", "classifier.weight"} <= graph.weights.keys()


def test_kept_layer_groups_stay_whole(graph, amax, queries, run):
    kept = {"layers.0.qkv", "layers.1.ffn2"}
    left = {linear.group for linear in find_linears(quantize(graph, "int8", amax, keep=kept))}
    assert left == kept
    everything = {linear.group for linear in find_linears(graph)}
    same = quantize(graph, "int8", amax, keep=everything)
    np.testing.assert_array_equal(run(same, queries[0][0]), run(graph, queries[0][0]))


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.15), ("fp8", 0.45)])
@pytest.mark.parametrize("element", ["float32", "float16"])
def test_scores_stay_near_and_do_move(graph, amax, queries, run, precision, element, limit):
    quantized = quantize(graph, precision, amax, scale_type=element)
    typed = quantized if element == "float32" else lower(quantized, element)
    batch = queries[0][0]
    exact, found = run(graph, batch), scorer(typed)(batch)
    assert 0 < np.abs(found - exact).max() < limit * float(np.ptp(exact))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_switches_score_as_the_graph_with_those_layer_groups_kept(graph, amax, queries, precision):
    switches = Switches(graph, quantize(graph, precision, amax))
    batch = queries[2][0]
    for kept in (set(), {"layers.0.ffn2", "layers.1.qkv"}):
        expected = scorer(quantize(graph, precision, amax, keep=kept))(batch)
        found = switches.score(batch, set(switches.groups) - kept)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_int8_is_emulated_in_float32_where_the_cpus_own_sums_would_overflow(
    graph, amax, queries, monkeypatch
):
    if not is_x86():
        pytest.skip("only x86 has int8 products that overflow")
    opened, session = [], onnxruntime.InferenceSession

    def open_session(content, *options, **more):
        opened.append(onnx.load_from_string(content))
        return session(content, *options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    quantized, batch = quantize(graph, "int8", amax), queries[0][0]
    monkeypatch.setenv("EDJE_CPU_FEATURES", "avx2,fma")
    in_float32 = scorer(quantized)(batch)
    weights = [w for w in opened[0].graph.initializer if w.data_type == onnx.TensorProto.INT8]
    assert [w.name for w in weights if len(w.dims) > 1] == []
    monkeypatch.delenv("EDJE_CPU_FEATURES")
    if why_no_vnni() is not None:
        pytest.skip(f"nothing to compare with: {why_no_vnni()}")
    np.testing.assert_allclose(in_float32, scorer(quantized)(batch), rtol=0, atol=1e-3)


def activations(values):
    found = Activations.none(values.shape[-1])
    found.add(values.astype(np.float32))
    return found


def test_percentile_cuts_off_one_value_of_ten_thousand():
    values = np.linspace(0.0, 1.0, 100_000).reshape(-1, 10)
    values[-1, -1] = 50.0
    found = activations(values)
    assert METHODS["max"](found, "int8") == 50.0
    assert METHODS["percentile 99.99"](found, "int8") == pytest.approx(0.9999, rel=0.02)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 3.0, 30.0]))
def test_mse_is_no_worse_than_any_other_cut(seed, outlier):
    random = np.random.default_rng(seed)
    values = random.standard_normal((500, 8)).astype(np.float32)
    values[0, 0] = outlier * 4

    def error(cut):
        scale = cut / 127
        return float(((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2).sum())

    found = activations(values)
    best = error(by_mse(found, "int8"))
    assert best <= 1.1 * min(error(found.amax * share) for share in np.linspace(0.02, 1, 60))


def test_observing_in_parts_is_observing_at_once():
    values = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    whole, parts = activations(values), activations(values[:20])
    parts.add(values[20:])
    np.testing.assert_array_equal(whole.counts, parts.counts)
    np.testing.assert_array_equal(whole.channel_amax, np.abs(values).max(axis=0))
    np.testing.assert_array_equal(parts.channel_amax, whole.channel_amax)


def test_smoothing_changes_nothing_in_float32_and_helps_where_channels_stand_out(
    graph, queries, run
):
    planted = graph.replaced(graph.nodes)
    gain = graph.array("layers.0.attention_norm.weight").copy()
    gain[3] *= 40  # as trained encoders have them
    planted.set_weight("layers.0.attention_norm.weight", gain)
    batches = [batch for query in queries for batch in query]
    seen = observe(planted, batches)
    value = "/layers.0/attention_norm/LayerNormalization_output"
    assert value in outlier_values(seen)
    even = smooth(planted, seen)
    exact = run(planted, batches[0])
    near = 1e-5 * np.abs(exact).max()
    np.testing.assert_allclose(run(even, batches[0]), exact, rtol=0, atol=near)
    after = observe(even, batches)
    assert f"{value}.smooth" in after
    assert max(outlier_values(after).values(), default=0) < outlier_values(seen)[value]

    def error(form, held):
        found = scorer(quantize(form, "int8", amax_by("max", held, "int8")))(batches[0])
        return np.abs(found - exact).mean()

    assert error(even, after) < error(planted, seen)
