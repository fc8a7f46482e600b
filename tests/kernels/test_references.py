"""The references are right: against the bundle's own graph, and against plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from edje.kernels.references import (
    Embeddings,
    add_types,
    assemble,
    gather_tokens,
    scatter_tokens,
)

HIDDEN_STATES = "pairs/slots"


@pytest.fixture(scope="module")
def graph(tiny_bundle: Path) -> onnx.ModelProto:
    """The tiny bundle's graph, which also returns what its first layer reads."""
    model = onnx.load(tiny_bundle / "joint_encoder.onnx")
    (node,) = (
        node for node in model.graph.node if HIDDEN_STATES in node.name and node.op_type == "Concat"
    )
    value = onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
    model.graph.output.append(value)
    return model


def embeddings_of(model: onnx.ModelProto) -> Embeddings:
    weights = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    types = np.stack(
        [weights["embeddings.text_type.weight"], weights["embeddings.tail_type.weight"]]
    )
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    (epsilon,) = (attribute.f for attribute in norm.attribute if attribute.name == "epsilon")
    words = weights["embeddings.word.weight"]
    (sep_id,) = np.flatnonzero((words == weights["embeddings.sep.weight"]).all(axis=1))
    positions = add_types(weights["embeddings.position.weight"], types)
    norms = (weights["embeddings.norm.weight"], weights["embeddings.norm.bias"])
    return Embeddings(words, positions, *norms, epsilon, int(sep_id))


def test_assemble_is_the_graph_up_to_its_first_layer(graph: onnx.ModelProto) -> None:
    embeddings, rng = embeddings_of(graph), np.random.default_rng(5)
    num_tokens = next(
        value.type.tensor_type.shape.dim[1].dim_value
        for value in graph.graph.input
        if value.name == "visual_tokens"
    )
    hidden = embeddings.words.shape[1]
    lengths = np.array([2, 9, 16], np.int32)
    ids = rng.integers(5, len(embeddings.words), (3, 16), dtype=np.int32)
    ids[np.arange(16) >= lengths[:, None]] = 0
    queries = np.array([2, 0, 1, 2], np.int32)
    tokens = rng.standard_normal((4, num_tokens, hidden)).astype(np.float16)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    feed = {
        "text_ids": ids,
        "text_length": lengths,
        "query_of_pair": queries,
        "visual_tokens": tokens,
    }
    _, expected = session.run(None, feed)
    rows = np.array([3, 1, 0, 2], np.int32)
    stored = np.empty_like(tokens)
    stored[rows] = tokens
    found = assemble(ids, lengths, queries, stored, rows, embeddings)
    assert found.dtype == np.float32
    assert found.shape == expected.shape == (4, 16 + num_tokens + 1, hidden)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_int8_records_are_their_values_times_their_scales() -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(-127, 128, (3, 4, 16), dtype=np.int8)
    scales = (2.0 ** rng.integers(-9, -2, (3, 4))).astype(np.float16)
    whole = values * scales[..., None]  # float16 holds products with powers of two exactly
    tables = Embeddings(
        rng.standard_normal((9, 16), np.float32),
        rng.standard_normal((2, 12, 16), np.float32),
        *rng.standard_normal((2, 16), np.float32),
        1e-12,
        3,
    )
    ids, lengths, pairs = np.array([[1, 5, 2]], np.int32), np.array([3], np.int32), np.zeros(3, int)
    batch = (ids, lengths, pairs.astype(np.int32))
    rows = np.array([2, 0, 1], np.int32)
    np.testing.assert_array_equal(
        assemble(*batch, values, rows, tables, scales=scales),
        assemble(*batch, whole, rows, tables),
    )


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_gather_leaves_negative_rows_and_marks_those_past_the_store(dtype: type) -> None:
    records = np.arange(3 * 2 * 8).reshape(3, 2, 8).astype(dtype)
    scales = np.arange(6).reshape(3, 2).astype(np.float16)
    out, out_scales = np.full((5, 2, 8), 7, dtype), np.full((5, 2), 7, np.float16)
    gather_tokens(records, np.array([2, -1, 0, 3, 2]), out, scales=scales, out_scales=out_scales)
    for place, row in ((0, 2), (2, 0), (4, 2)):
        np.testing.assert_array_equal(out[place], records[row])
        np.testing.assert_array_equal(out_scales[place], scales[row])
    assert (out[1] == 7).all()
    assert (out_scales[1] == 7).all()
    assert np.isnan(out_scales[3]).all()
    assert dtype is np.int8 or np.isnan(out[3]).all()


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_scatter_writes_its_places_and_nothing_else(dtype: type) -> None:
    tokens = np.arange(4 * 2 * 8).reshape(4, 2, 8).astype(dtype)
    scales = np.arange(8).reshape(4, 2).astype(np.float16)
    pool, pool_scales = np.full((3, 2, 8), 99, dtype), np.full((3, 2), 99, np.float16)
    places = np.array([2, -1, 3, 0])
    scatter_tokens(tokens, places, pool, scales=scales, pool_scales=pool_scales)
    for pair, place in ((0, 2), (3, 0)):
        np.testing.assert_array_equal(pool[place], tokens[pair])
        np.testing.assert_array_equal(pool_scales[place], scales[pair])
    assert (pool[1] == 99).all()
    assert (pool_scales[1] == 99).all()


def test_what_was_scattered_is_gathered_again() -> None:
    rng = np.random.default_rng(3)
    tokens, pool = rng.standard_normal((5, 2, 8)), np.zeros((9, 2, 8))
    places = rng.permutation(9)[:5]
    scatter_tokens(tokens, places, pool)
    out = np.empty_like(tokens)
    gather_tokens(pool, places, out)
    np.testing.assert_array_equal(out, tokens)
