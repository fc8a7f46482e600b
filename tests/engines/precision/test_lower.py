"""float16 and bfloat16: what is lowered, what is not, and that the emulation rounds like it."""

from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import checker, helper, shape_inference
from onnx.reference import ReferenceEvaluator
from onnxruntime import InferenceSession

from edje.bundle import INPUTS
from edje.engines.agreement import kendall_tau
from edje.engines.precision.emulate import emulated, runner, scorer
from edje.engines.precision.float8 import round_to_float8
from edje.engines.precision.graph import Graph, in_layers
from edje.engines.precision.lower import ONNX_TYPES, lower, lower_operands
from edje.errors import EngineError

LOW = ("float16", "bfloat16")


def types_of(graph):
    """The element type of every value, by an inference that is not ours."""
    model = shape_inference.infer_shapes(graph.model(), check_type=True, strict_mode=True)
    return {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}


@pytest.mark.parametrize("element", LOW)
def test_every_node_of_the_layers_is_low_but_for_mask_and_softmax(graph, element):
    lowered = lower(graph, element)
    checker.check_model(lowered.model(), full_check=True)
    types = types_of(lowered)
    left = Counter()
    for node in lowered.nodes:
        if in_layers(node) and types[node.output[0]] == ONNX_TYPES["float32"]:
            left[node.op_type] += 1
    num_layers = sum(node.op_type == "Softmax" for node in graph.nodes)
    to_pooler = 1
    assert left == {"Cast": num_layers + to_pooler, "Add": num_layers, "Softmax": num_layers}
    wanted = ONNX_TYPES[element]
    low = {node.op_type for node in lowered.nodes if types.get(node.output[0]) == wanted}
    assert {"MatMul", "Add", "Gelu", "LayerNormalization"} <= low


@pytest.mark.parametrize("element", LOW)
def test_embeddings_statistics_pooler_and_head_stay_float32(graph, element):
    before = graph.model().SerializeToString()
    lowered = lower(graph, element)
    types = types_of(lowered)
    outside = [n for n in lowered.nodes if n.name.startswith(("/embeddings", "/pooler", "/class"))]
    narrow = (ONNX_TYPES["float16"], ONNX_TYPES["bfloat16"])
    low = {n.name for n in outside if types.get(n.output[0]) in narrow}
    # The table of words is stored in float16, where that rounds to 11 bits.
    assert low == ({"/embeddings/word/Gather"} if element == "float16" else set())
    assert len(outside) > 15
    assert {v.name: v.type for v in lowered.inputs} == {v.name: v.type for v in graph.inputs}
    assert graph.model().SerializeToString() == before
    for norm in (node for node in lowered.nodes if node.op_type == "LayerNormalization"):
        stash = [attribute.i for attribute in norm.attribute if attribute.name == "stash_type"]
        assert stash in ([], [1])  # float32 is also the default


def test_the_emulation_scores_as_the_graph_itself(graph, queries):
    batch = queries[0][0].part(slice(0, 3))
    lowered = lower(graph, "float16")
    (exact,) = ReferenceEvaluator(lowered.model()).run(
        None, {name: getattr(batch, name) for name in INPUTS}
    )
    float32 = runner(graph)(batch)[0]
    found = scorer(lowered)(batch)
    assert np.abs(exact - float32).max() > 1e-4  # it does round
    np.testing.assert_allclose(found, exact, rtol=0, atol=np.abs(exact - float32).max())


@pytest.mark.parametrize(("element", "bits"), [("float16", 13), ("bfloat16", 16)])
def test_emulated_values_have_the_bits_of_their_type_only(graph, queries, element, bits):
    lowered = emulated(lower(graph, element))
    names = ["/layers.0/ffn_norm/LayerNormalization_output", "/layers.1/ffn1/Gelu_output"]
    for values in runner(lowered, names)(queries[0][0]):
        assert not (values.view(np.uint32) & ((1 << bits) - 1)).any()
        assert values.std() > 0


@pytest.mark.parametrize(("element", "bits"), [("float16", 13), ("bfloat16", 16)])
def test_operands_alone_are_rounded_where_kernels_add_in_float32(graph, queries, element, bits):
    lowered = lower_operands(graph, element)
    checker.check_model(lowered.model(), full_check=True)
    used = {weight.name for weight in lowered.model().graph.initializer}
    added = {name for name in graph.weights if name.endswith(".bias") or "norm." in name}
    assert added <= used
    operands = [name for node in lowered.nodes for name in node.input if node.op_type == "MatMul"]
    values = [name for name in operands if name not in lowered.weights and "layers" in name]
    weights = [lowered.array(name) for name in operands if name in used and "layers" in name]
    for each in [*weights, *runner(emulated(lowered), values)(queries[0][0])]:
        assert not (each.view(np.uint32) & ((1 << bits) - 1)).any()
        assert each.std() > 0


def test_scores_are_nearer_to_float32_where_operands_alone_are_rounded(graph, queries):
    exact, *found = (
        np.concatenate([scorer(each)(batch) for query in queries for batch in query])
        for each in (graph, lower_operands(graph, "float16"), lower(graph, "float16"))
    )
    operands, whole = (np.sqrt(np.mean((each - exact) ** 2)) for each in found)
    assert 0 < operands < 0.8 * whole


def test_weights_too_large_for_float16_are_all_named(graph):
    for name in ("layers.0.ffn1.weight", "layers.1.key.weight"):
        values = graph.array(name).copy()
        values[0, 0] = 1e6
        graph.set_weight(name, values)
    with pytest.raises(EngineError, match="do not fit") as caught:
        lower(graph, "float16")
    assert caught.value.faults == (
        "layers.0.ffn1.weight: largest is 1e+06",
        "layers.1.key.weight: largest is 1e+06",
    )
    lower(graph, "bfloat16")


@pytest.mark.parametrize("element", LOW)
def test_tokens_a_thousand_times_as_large_never_give_nan(graph, queries, run, element):
    batch = queries[1][0]
    loud = np.clip(batch.visual_tokens.astype(np.float32) * 1e3, -65504, 65504)
    large = type(batch)(
        batch.text_ids, batch.text_length, batch.query_of_pair, loud.astype(np.float16)
    )
    exact, found = run(graph, large), scorer(lower(graph, element))(large)
    assert np.isfinite(found).all()
    assert kendall_tau(exact, found) >= (0.95 if element == "float16" else 0.7)
    limit = 0.05 if element == "float16" else 0.5
    assert np.abs(found - exact).max() < limit * max(1.0, exact.std())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_float8_rounding_is_that_of_the_type(seed):
    random = np.random.default_rng(seed)
    scale = np.float32(random.uniform(1e-4, 10))
    size = np.float32(10.0 ** random.uniform(-6, 4))
    values = random.standard_normal(400).astype(np.float32) * size
    info = [helper.make_tensor_value_info(name, 1, ["n"]) for name in "xy"]
    opset = [helper.make_opsetid("", 20)]
    shell = helper.make_graph([], "g", info[:1], info[1:])
    graph = Graph(helper.make_model(shell, opset_imports=opset, ir_version=10))
    graph.set_weight("scale", scale)
    graph.nodes += round_to_float8(
        graph, helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], "q")
    )
    session = InferenceSession(graph.model().SerializeToString())
    cut = np.clip(values / scale, -448, 448)
    expected = cut.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": values})[0], expected)
