"""A bundle that makes tokens out of mean colours or mean features: tiny, fast, exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edje.bundle import BundleManifest, ImageSpec, ModelSizes, TextSpec
from edje.runtime.store import TokenStore

SIZE, NUM_TOKENS, HIDDEN, FEATURE_DIM = 8, 4, 6, 5


def make_bundle(folder: Path, *, fingerprint: str = "tower-1", size: int = SIZE) -> Path:
    """Write a bundle that holds only the encoders: tokens = means times constants."""
    folder.mkdir()
    pixels, features = ["B", 3, size, size], ["B", "N", FEATURE_DIM]
    onnx.save(mean_graph("pixels", pixels, 3, [2, 3]), folder / "image_encoder.onnx")
    onnx.save(mean_graph("features", features, FEATURE_DIM, [1]), folder / "adapter.onnx")
    BundleManifest(
        sizes=ModelSizes(NUM_TOKENS, HIDDEN, 1, 1, 4, 10, FEATURE_DIM, None),
        text=TextSpec("none", 61, 1, 2, 0),
        image=ImageSpec(size, 2, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        fingerprint_encoder=fingerprint,
        fingerprint_scorer="scorer",
        provenance={},
    ).write(folder)
    return folder


def scale_of(num_inputs: int) -> np.ndarray:
    """The constants: float32 [inputs, m * H]."""
    values = np.linspace(1, 2, num_inputs * NUM_TOKENS * HIDDEN, dtype=np.float32)
    return values.reshape(num_inputs, -1)


def mean_graph(name: str, shape: list[object], num_inputs: int, axes: list[int]) -> onnx.ModelProto:
    nodes = [
        helper.make_node("ReduceMean", [name, "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "scale"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["tokens"]),
        helper.make_node("Cast", ["tokens"], ["visual_tokens"], to=TensorProto.FLOAT16),
    ]
    tokens = ["B", NUM_TOKENS, HIDDEN]
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("visual_tokens", TensorProto.FLOAT16, tokens)],
        [
            numpy_helper.from_array(scale_of(num_inputs), "scale"),
            numpy_helper.from_array(np.array(axes), "axes"),
            numpy_helper.from_array(np.array([-1, NUM_TOKENS, HIDDEN]), "shape"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def records(store: Path) -> dict[str, bytes]:
    """Every id of a store with the bytes of its float16 record; a damaged one raises."""
    with TokenStore.open(store) as opened:
        ids = opened.ids()
        out = np.empty((len(ids), NUM_TOKENS, HIDDEN), np.float16)
        opened.read(opened.rows(ids), out)
    assert len(set(ids)) == len(ids)
    return {image_id: tokens.tobytes() for image_id, tokens in zip(ids, out, strict=True)}
