"""The exported graphs as engines see them: signature, names, weights once, no wasted work."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edje.export.onnx_graphs import folded

GRAPHS = ("joint_encoder.onnx", "adapter.onnx", "image_encoder.onnx")


@pytest.fixture(scope="module", params=GRAPHS)
def model(request, tiny_bundle: Path) -> onnx.ModelProto:
    return onnx.load(tiny_bundle / request.param)


@pytest.fixture(scope="module")
def scorer(tiny_bundle: Path) -> onnx.ModelProto:
    return onnx.load(tiny_bundle / "joint_encoder.onnx")


def signature(model: onnx.ModelProto) -> list[tuple[str, str, list[object]]]:
    rows = []
    for value in [*model.graph.input, *model.graph.output]:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        rows.append((value.name, dtype, [d.dim_param or d.dim_value for d in kind.shape.dim]))
    return rows


TOKENS = ("visual_tokens", "float16", ["B", 64, 32])
SIGNATURES = {
    "joint_encoder": [
        ("text_ids", "int32", ["Q", "T"]),
        ("text_length", "int32", ["Q"]),
        ("query_of_pair", "int32", ["P"]),
        ("visual_tokens", "float16", ["P", 64, 32]),
        ("scores", "float32", ["P"]),
    ],
    "adapter": [("features", "float32", ["B", "N", 48]), TOKENS],
    "image_encoder": [("pixels", "float32", ["B", 3, 32, 32]), TOKENS],
}


def test_graphs_are_valid_with_the_signatures_of_the_design(model):
    onnx.checker.check_model(model, full_check=True)
    assert signature(model) == SIGNATURES[model.graph.name]


def test_node_names_are_unique_and_every_weight_is_used_and_stored_once(model):
    assert max(Counter(node.name for node in model.graph.node).values()) == 1
    used = {name for node in model.graph.node for name in node.input}
    names = [weight.name for weight in model.graph.initializer]
    assert len(names) == len(set(names))
    assert set(names) <= used
    large = [w for w in model.graph.initializer if np.prod(w.dims) >= 64]
    contents = Counter(numpy_helper.to_array(weight).tobytes() for weight in large)
    assert max(contents.values()) == 1


def test_norms_and_activations_are_single_nodes(scorer):
    kinds = Counter(node.op_type for node in scorer.graph.node)
    assert kinds["LayerNormalization"] == 3 + 2 * 2  # three embedding norms, two a layer
    assert (kinds["Gelu"], kinds["Softmax"], kinds["GatherND"]) == (2, 2, 0)


def test_the_last_layer_attends_for_the_cls_row_only(scorer):
    inferred = onnx.shape_inference.infer_shapes(scorer, data_prop=True)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in inferred.graph.value_info
    }
    assert shapes["/layers.1/cls/Gather_output"][1:] == [1, 32]
    assert shapes["/layers.1/query/MatMul_output"][1:] == [1, 32]
    assert shapes["/layers.1/key/MatMul_output"][2:] == [32]


def test_query_key_and_value_are_products_of_one_input(scorer):
    products = {node.name: node for node in scorer.graph.node if node.op_type == "MatMul"}
    inputs = {products[f"/layers.0/{name}/MatMul"].input[0] for name in ("query", "key", "value")}
    assert len(inputs) == 1


def test_masks_stay_finite_in_half_precision(scorer):
    constants = [numpy_helper.to_array(weight) for weight in scorer.graph.initializer]
    lowest = min(float(c.min()) for c in constants if c.dtype == np.float32)
    assert lowest == -1e4
    assert np.isfinite(np.float16(lowest))
    assert np.exp(np.float32(lowest)) == 0


def test_folding_two_linear_maps_is_exact_to_float32():
    torch.manual_seed(3)
    first, second = nn.Linear(48, 40), nn.Linear(40, 56)
    weight, bias = folded(first, second)
    x = torch.randn(100, 48)
    with torch.inference_mode():
        want = second.double()(first.double()(x.double())).numpy()
    got = x.double().numpy() @ weight.astype(np.float64).T + bias
    assert weight.dtype == bias.dtype == np.float32
    assert np.abs(got - want).max() < 1e-6
