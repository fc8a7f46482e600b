"""Scales found while running: the pass against the scheme in NumPy, its names and its types."""

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, checker, helper, numpy_helper, shape_inference

from edje.engines.precision.calibrate import observe, smooth
from edje.engines.precision.dynamic import BLOCK, dynamic_linears, quantize_dynamic
from edje.engines.precision.emulate import Switches, emulated, runner, scorer
from edje.engines.precision.graph import Graph
from edje.engines.precision.lower import ONNX_TYPES, lower
from edje.engines.precision.static import LARGEST, find_linears

from .conftest import with_outliers

PRECISIONS = tuple(LARGEST)


def stepped(values, precision, axis):
    """Quantise blocks of 128 along `axis`; return steps and scales, as a kernel has them."""
    steps, scales = [], []
    for start in range(0, values.shape[axis], BLOCK):
        block = np.take(values, range(start, min(start + BLOCK, values.shape[axis])), axis)
        amax = np.abs(block).max(axis=axis, keepdims=True)
        scale = np.maximum(amax, np.float32(1e-30)) / np.float32(LARGEST[precision])
        # Kernels multiply by the reciprocal; weights are divided, when an engine is built.
        ratio = block * (np.float32(1) / scale) if axis else block / scale
        if precision == "int8":
            steps.append(np.rint(ratio))
        else:
            steps.append(np.clip(ratio, -448, 448).astype(ml_dtypes.float8_e4m3fn))
        scales.append(scale)
    return steps, scales


def product(values, weight, precision):
    """Multiply block by block: exact sums of steps, times both scales, added in float32."""
    total = np.zeros((len(values), weight.shape[1]), np.float32)
    left, right = stepped(values, precision, 1), stepped(weight, precision, 0)
    for a, a_scale, w, w_scale in zip(*left, *right, strict=True):
        total += (
            (a.astype(np.float64) @ w.astype(np.float64)).astype(np.float32) * a_scale * w_scale
        )
    return total


def one_linear(weight, rank=2):
    """A graph that is one linear of an encoder's layer."""
    shape = [f"d{axis}" for axis in range(rank - 1)]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [*shape, weight.shape[0]])
    found = helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape, weight.shape[1]])
    item = helper.make_node("MatMul", ["x", "layers.0.ffn1.weight"], ["y"], "/layers.0/ffn1/MatMul")
    stored = [numpy_helper.from_array(weight, "layers.0.ffn1.weight")]
    shell = helper.make_graph([item], "g", [given], [found], stored)
    opset = [helper.make_opsetid("", 20)]
    return Graph(helper.make_model(shell, opset_imports=opset, ir_version=10))


def ran(graph, values, outputs=("y",)):
    session = onnxruntime.InferenceSession(graph.model(outputs[1:]).SerializeToString())
    return session.run(list(outputs), {"x": values})


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 5, 96, 127, 128, 129, 256, 300, 384, 500]),
    st.sampled_from(PRECISIONS),
    st.integers(2, 4),
)
def test_what_is_rounded_is_the_schemes_bit_by_bit_and_so_is_the_product_nearly(
    seed, num_in, precision, rank
):
    random = np.random.default_rng(seed)
    rows, num_out = int(np.prod(range(2, rank + 1))), int(random.integers(1, 40))
    values = random.standard_normal((rows, num_in), np.float32)
    values *= np.float32(10) ** random.uniform(-4, 3, (rows, num_in)).astype(np.float32)
    values[0] = 0
    weight = random.standard_normal((num_in, num_out), np.float32)
    weight[:, 0] = 0
    graph = quantize_dynamic(one_linear(weight, rank), precision)
    checker.check_model(graph.model(), full_check=True)
    cut = values.reshape(*range(2, rank + 1), num_in)
    found, activations = ran(graph, cut, ("y", "x.dynamic"))
    steps, scales = stepped(values, precision, 1)
    exact = [np.float32(step) * scale for step, scale in zip(steps, scales, strict=True)]
    np.testing.assert_array_equal(activations.reshape(rows, num_in), np.concatenate(exact, 1))
    steps, scales = stepped(weight, precision, 0)
    stored = graph.array("layers.0.ffn1.weight.quantized")
    assert stored.dtype == ("int8" if precision == "int8" else "float8_e4m3fn")
    np.testing.assert_array_equal(np.float32(stored), np.float32(np.concatenate(steps)))
    by_block = graph.array("layers.0.ffn1.weight.scales")
    assert (by_block.dtype, by_block.shape) == (np.float32, (-(-num_in // BLOCK), num_out))
    np.testing.assert_array_equal(by_block, np.concatenate(scales))
    expected = product(values, weight, precision)
    near = 1e-5 * np.abs(values).sum(1, keepdims=True) * np.abs(weight).max()
    assert (np.abs(found.reshape(rows, num_out) - expected) <= near).all()


@pytest.mark.parametrize("never", [(), ("attention_output",)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_linears_but_what_never_is_are_quantised_under_their_names(graph, precision, never):
    quantized = quantize_dynamic(graph, precision, never=never)
    checker.check_model(quantized.model(), full_check=True)
    left = {linear.group.rpartition(".")[2] for linear in find_linears(quantized)}
    assert left == set(never)
    products = {node.name: node for node in quantized.nodes if node.op_type == "MatMul"}
    shared = {products[f"/layers.0/{part}/MatMul"].input[0] for part in ("query", "key", "value")}
    assert len(shared) == 1
    makers = [node for node in quantized.nodes if shared & set(node.output)]
    assert [node.name.rpartition("/")[0] for node in makers] == ["/layers.0/query/dynamic/back"]
    for linear in dynamic_linears(graph, never):
        assert {f"{linear.weight}.quantized", f"{linear.weight}.scales"} <= set(quantized.weights)
    for name in graph.weights:
        np.testing.assert_array_equal(quantized.array(name), graph.array(name))


def test_kept_layer_groups_stay_whole(graph, queries, run):
    kept = {"layers.0.qkv", "layers.1.ffn2"}
    left = {linear.group for linear in find_linears(quantize_dynamic(graph, "int8", keep=kept))}
    assert left == kept
    same = quantize_dynamic(graph, "int8", keep={linear.group for linear in find_linears(graph)})
    np.testing.assert_array_equal(run(same, queries[0][0]), run(graph, queries[0][0]))


def types_of(graph):
    model = shape_inference.infer_shapes(graph.model(), check_type=True, strict_mode=True)
    return {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_lowered_the_scheme_stays_float32_from_the_value_to_the_product(
    graph, queries, precision, element
):
    batches, planted = queries[0], with_outliers(graph)
    even = smooth(planted, observe(planted, batches))
    lowered = lower(quantize_dynamic(even, precision, never=("attention_output",)), element)
    checker.check_model(lowered.model(), full_check=True)
    types, smoothed = types_of(lowered), 0
    for node in lowered.nodes:
        inside = "/dynamic/" in node.name or node.input[0].endswith(".dynamic")
        if inside or node.name.endswith(("/ffn1/smooth/Mul", "/query/smooth/Mul")):
            assert types[node.output[0]] in (TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64)
            smoothed += node.name.endswith("/smooth/Mul")
        if node.name.endswith(("ffn1/Add", "attention_output/MatMul")):
            assert types[node.output[0]] == ONNX_TYPES[element]
    assert smoothed
    assert {"layers.0.ffn1.smooth", "layers.0.ffn1.weight.smooth.scales"} <= set(lowered.weights)
    value = "/layers.0/ffn1/MatMul_output"
    (rounded,) = runner(emulated(lowered), [f"{value}.{element}"])(batches[0])
    bits = 13 if element == "float16" else 16
    assert not (rounded.view(np.uint32) & ((1 << bits) - 1)).any()


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.1), ("fp8", 0.45)])
def test_switches_score_as_the_graph_with_those_layer_groups_kept(graph, queries, precision, limit):
    switches = Switches(graph, quantize_dynamic(graph, precision))
    assert len(switches.groups) == len({linear.group for linear in dynamic_linears(graph)})
    batch = queries[2][0]
    exact = runner(graph)(batch)[0]
    np.testing.assert_allclose(switches.score(batch, []), exact, rtol=0, atol=1e-5)
    for kept in (set(), {"layers.0.ffn2", "layers.1.qkv"}):
        expected = scorer(quantize_dynamic(graph, precision, keep=kept))(batch)
        found = switches.score(batch, set(switches.groups) - kept)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        assert 0 < np.abs(found - exact).max() < limit * float(np.ptp(exact))
