"""The names in `joint_encoder.onnx`: what `export` writes is what the engines look for."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from edje import bundle
from edje.bundle import (
    LINEARS,
    BundleManifest,
    group_of,
    layer_of,
    layer_path,
    linear_of,
    node_name,
    path_of_node,
    products_of,
    value_name,
    weight_name,
)
from edje.engines.precision.graph import Graph
from edje.engines.precision.lower import WORD_GATHER
from edje.engines.precision.static import find_linears


@pytest.fixture(scope="module")
def exported(tiny_bundle: Path) -> onnx.GraphProto:
    return onnx.load(tiny_bundle / bundle.JOINT_ENCODER).graph


@pytest.fixture(scope="module")
def num_layers(tiny_bundle: Path) -> int:
    return BundleManifest.read(tiny_bundle).sizes.num_layers


def test_names_follow_the_contract_and_values_their_nodes(exported):
    assert tuple(value.name for value in exported.input) == bundle.INPUTS
    assert tuple(value.name for value in exported.output) == (bundle.OUTPUT,)
    for node in exported.node:
        path = path_of_node(node.name)
        assert node.name == node_name(path, node.op_type)
        value = value_name(path, node.op_type)
        several = [f"{value}_{number}" for number in range(len(node.output))]
        assert list(node.output) in ([value], [bundle.OUTPUT], several)


def test_every_layer_has_its_linears_and_its_attention(exported, num_layers):
    nodes = {node.name: node for node in exported.node}
    weights = {weight.name for weight in exported.initializer}
    for number in range(num_layers):
        for part in LINEARS:
            path = layer_path(number, part)
            assert nodes[node_name(path, "MatMul")].input[1] == weight_name(path)
            assert weight_name(path, "bias") in weights
        for part, kind in (
            (bundle.ATTENTION_SCORES, "MatMul"),
            (bundle.ATTENTION_SCORES, "Add"),
            (bundle.ATTENTION, "Softmax"),
            (bundle.CONTEXT, "MatMul"),
        ):
            assert node_name(layer_path(number, part), kind) in nodes
    assert {layer_of(name) for name in nodes} == {None, *range(num_layers)}
    assert WORD_GATHER in nodes


def test_the_precision_passes_find_every_linear_in_its_group(tiny_bundle, num_layers):
    linears = find_linears(Graph.read(tiny_bundle / bundle.JOINT_ENCODER))
    names = [f"{layer_path(number)}.{part}" for number in range(num_layers) for part in LINEARS]
    assert sorted(linear.name for linear in linears) == sorted(names)
    for linear in linears:
        assert linear.weight == weight_name(linear.name)
        assert linear.group == group_of(linear.name)
    groups = {linear.group for linear in linears}
    assert len(groups) == 4 * num_layers
    products = [product for group in groups for product in products_of(group)]
    assert sorted(map(linear_of, products)) == sorted(names)


def test_names_outside_the_layers_belong_to_none() -> None:
    assert layer_of("/layers.11/ffn2/MatMul") == 11
    outside = ("/embeddings/word/Gather", "/pooler/MatMul", "/x/layers.3/MatMul", "layers.3.ffn1")
    assert [layer_of(name) for name in outside] == [None] * 4
    parts = ("query", "key", "value")
    assert products_of("layers.3.qkv") == tuple(f"/layers.3/{part}/MatMul" for part in parts)
    assert products_of("layers.3.ffn2") == ("/layers.3/ffn2/MatMul",)
    assert {group_of(f"layers.3.{part}") for part in parts} == {"layers.3.qkv"}
    assert group_of("layers.3.ffn1") == "layers.3.ffn1"
