"""int8 in ONNX Runtime: all linears run in int8, and no sum overflows on a CPU without VNNI."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from avx2_only import FEATURES, run_on_avx2
from edje.bundle import INPUTS, JOINT_ENCODER, BundleManifest
from edje.engines import cpu
from edje.engines import onnxruntime as ort
from edje.engines.builder.build import build_engine
from edje.engines.cpu import weights_fit_16_bits
from edje.engines.manifest import EngineManifest, Profile
from edje.engines.onnxruntime_int8 import write_for_x86
from edje.engines.precision.emulate import scorer
from edje.engines.precision.graph import Graph
from edje.engines.precision.prepare import Recipe, prepare_graph
from edje.engines.precision.static import largest_weight, round_to
from edje.engines.registry import open_engine
from edje.engines.samples import RandomSamples
from edje.engines.scales import Scales
from edje.errors import EngineError
from edje.machine import is_x86

pytestmark = pytest.mark.skipif(not is_x86(), reason="only x86 has int8 products that overflow")

SUPPORT = Path(__file__).parents[1] / "support"
PAIRS = [(caption, image) for caption in range(5) for image in range(12)]
WAYS = ("static", "dynamic")
LINEARS = 12  # of the fixture's two layers
# An activation at the border of two steps may round either way: largest |score difference|.
ROUNDING = 0.1


def build(bundle, out, samples):
    return build_engine(bundle, out, backend="onnxruntime", precision="int8", calibration=samples)


@pytest.fixture
def without_vnni(monkeypatch):
    monkeypatch.setenv("EDJE_CPU_FEATURES", FEATURES)


@pytest.fixture(scope="module")
def samples(tiny_bundle: Path) -> RandomSamples:
    return RandomSamples(BundleManifest.read(tiny_bundle), num_queries=2, num_candidates=8)


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Path, samples, tmp_path_factory) -> dict[str, Path]:
    """One int8 graph for every way of scaling that a CPU with AVX2 only is offered."""
    folder, bundle = tmp_path_factory.mktemp("graphs"), BundleManifest.read(tiny_bundle)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("EDJE_CPU_FEATURES", FEATURES)
        ways = ort.activation_scales("int8", bundle.sizes)
    found = {name: folder / f"{name}.onnx" for name in WAYS}
    for way, out in zip(ways, found.values(), strict=True):
        recipe = Recipe("int8", "float32", calibration=samples, scales=(way,))
        plan = prepare_graph(tiny_bundle / JOINT_ENCODER, out, recipe, bundle, Profile(64, (63,)))
        assert plan["weights"].startswith("int8 of 7 bits (-63 to 63), ")
    return found


def saturating_sums(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Multiply as AVX2 does: two products of bytes are added in 16 bits, and cut off."""
    products = rows.astype(np.int32)[..., None] * weights.astype(np.int32)
    if products.shape[-2] % 2:
        products = np.concatenate([products, np.zeros_like(products[..., :1, :])], axis=-2)
    pairs = products[..., ::2, :] + products[..., 1::2, :]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(axis=-2)


def exact_sums(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return rows.astype(np.int64) @ weights.astype(np.int64)


def worst_rows(weights: np.ndarray) -> np.ndarray:
    """Return unsigned bytes whose sums with some column are as large, or as small, as can be."""
    return np.concatenate([(weights.T > 0) * 255, (weights.T < 0) * 255]).astype(np.uint8)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.1, 1.0, 30.0]),
)
def test_no_bytes_overflow_with_weights_of_7_bits(num_inputs, seed, spread):
    random = np.random.default_rng(seed)
    gains = np.exp(spread * random.random((num_inputs, 1)))
    values = random.standard_normal((num_inputs, 6)) * gains
    largest = largest_weight("int8", 7)
    scale = np.abs(values).max(axis=0) / largest
    weights = round_to(values / scale, np.dtype(np.int8), largest)
    rows = random.integers(0, 256, (8, num_inputs), np.uint8)
    rows = np.concatenate([rows, worst_rows(weights)])
    np.testing.assert_array_equal(saturating_sums(rows, weights), exact_sums(rows, weights))
    assert weights_fit_16_bits(weights)


def test_weights_of_8_bits_overflow_and_are_found():
    weights = np.array([[127], [127], [-127], [-127]], np.int8)
    rows = worst_rows(weights)
    lost = saturating_sums(rows, weights) - exact_sums(rows, weights)
    assert np.abs(lost).max() == 2 * 255 * 127 - (2**15 - 1)
    assert not weights_fit_16_bits(weights)
    assert not weights_fit_16_bits(np.array([-128], np.int8))
    assert weights_fit_16_bits(np.array([64, -64], np.int8))
    assert not weights_fit_16_bits(np.array([65], np.int8))


@pytest.mark.parametrize("way", WAYS)
def test_every_linear_runs_in_int8_and_no_product_of_a_plan_can_overflow(graphs, tmp_path, way):
    write_for_x86(graphs[way], tmp_path / "fitted.onnx", has_vnni=False)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / "fitted.onnx", options, ["CPUExecutionProvider"])
    graph = Graph.read(tmp_path / "opened.onnx")
    products = [item for item in graph.nodes if item.op_type == "MatMulIntegerToFloat"]
    assert len(products) == LINEARS
    assert not [item for item in graph.nodes if item.op_type == "DequantizeLinear"]
    for item in products:
        weights, zero = (graph.array(item.input[index]) for index in (1, 5))
        assert (weights.dtype, graph.array(item.input[4]).dtype) == (np.int8, np.uint8)
        assert not zero.any()
        rows = worst_rows(weights)
        np.testing.assert_array_equal(saturating_sums(rows, weights), exact_sums(rows, weights))


def test_weights_of_8_bits_are_refused_for_a_cpu_without_vnni(
    tiny_bundle, samples, tmp_path, without_vnni, monkeypatch
):
    monkeypatch.setattr(ort, "activation_scales", lambda *_: [Scales()])
    with pytest.raises(EngineError, match="holds 127, and sums of its products overflow"):
        build(tiny_bundle, tmp_path / "engine", samples)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", WAYS)
def test_the_form_for_x86_scores_as_the_graph(graphs, tmp_path, official_pairs, way):
    write_for_x86(graphs[way], tmp_path / "fitted.onnx", has_vnni=False)
    batch = official_pairs.batch(PAIRS, 63)
    session = onnxruntime.InferenceSession(
        tmp_path / "fitted.onnx", providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {name: getattr(batch, name) for name in INPUTS})[0]
    expected = scorer(Graph.read(graphs[way]))(batch)
    assert np.abs(found - expected).max() < ROUNDING
    assert np.corrcoef(found, expected)[0, 1] > 0.999


def test_scales_for_a_part_of_a_row_are_refused(tiny_bundle, samples, tmp_path, monkeypatch):
    blocks = [Scales("dynamic", block=8)]
    monkeypatch.setattr(ort, "activation_scales", lambda *_: blocks)
    with pytest.raises(EngineError, match="scales for a row, this form of int8 has one"):
        build(tiny_bundle, tmp_path / "engine", samples)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("features", "ways"),
    [
        (("avx2", "fma"), ["static 7", "dynamic 7"]),
        (("avx2", "fma", "avx512f"), ["static 7", "dynamic 7"]),
        (("avx2", "fma", "avx_vnni"), ["static 8"]),
    ],
)
def test_without_vnni_weights_have_7_bits(tiny_bundle, monkeypatch, features, ways):
    monkeypatch.setattr("edje.machine.cpu_features", lambda: features)
    assert ort.why_not("int8") is None
    offered = ort.activation_scales("int8", BundleManifest.read(tiny_bundle).sizes)
    assert [f"{each.kind} {each.weight_bits}" for each in offered] == ways
    assert [each.cost for each in offered] == sorted(each.cost for each in offered)


def test_auto_tries_int8_without_vnni_and_says_how_wide_its_weights_are(
    tiny_bundle, tmp_path, without_vnni, monkeypatch
):
    samples = RandomSamples(BundleManifest.read(tiny_bundle), 4, 8)
    monkeypatch.setattr(type(samples), "random", False)
    out = tmp_path / "engine"
    manifest = build_engine(tiny_bundle, out, calibration=samples)
    trials = {(t["backend"], t["precision"]): t for t in manifest.build_options["auto"]}
    assert "slower than float32 then" in trials["openvino", "int8"]["not_tried"]
    tried = trials["onnxruntime", "int8"]
    assert tried["not_tried"] is None
    rates = {name: trial["pairs_per_s"] for name, trial in trials.items() if trial["pairs_per_s"]}
    assert ("onnxruntime", "int8") in rates or tried["refused"]
    assert (manifest.backend, manifest.precision) == max(rates, key=rates.get)


@pytest.fixture
def engine(tiny_bundle, samples, tmp_path, without_vnni) -> Path:
    folder = tmp_path / "engine"
    build(tiny_bundle, folder, samples)
    return folder


def test_a_manifest_says_that_weights_have_7_bits_and_that_avx2_is_enough(engine, monkeypatch):
    manifest = EngineManifest.read(engine)
    assert manifest.precision_plan["weights"].startswith("int8 of 7 bits (-63 to 63)")
    assert manifest.device["features"] == FEATURES.split(",")
    assert cpu.device_faults(manifest) == []
    monkeypatch.delenv("EDJE_CPU_FEATURES")
    open_engine(engine).close()


# What follows runs the library's own AVX2 kernels, on a real or an emulated CPU.


def write_product(path: Path, weights: np.ndarray) -> None:
    """Write a model of one product, with operands and sums for `worst_products.py`."""
    signed = weights.dtype == np.int8
    middle = np.array(0 if signed else 128, weights.dtype)
    rows = worst_rows(weights.astype(np.int16) - int(middle))
    one = np.float32(1)
    stored = {"weights": weights, "one": one, "zero": np.uint8(0), "middle": middle}
    inputs = ["rows", "weights", "one", "one", "zero", "middle"]
    graph = helper.make_graph(
        [helper.make_node("MatMulIntegerToFloat", inputs, ["sums"], domain="com.microsoft")],
        "product",
        [helper.make_tensor_value_info("rows", TensorProto.UINT8, rows.shape)],
        [helper.make_tensor_value_info("sums", TensorProto.FLOAT, [len(rows), weights.shape[1]])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), path)
    sums = exact_sums(rows, weights.astype(np.int64) - int(middle))
    np.savez(f"{path}.npz", rows=rows, sums=sums.astype(np.float32))


def test_the_librarys_avx2_kernels_add_7_bits_exactly_and_cut_8_bits_off(tmp_path):
    random = np.random.default_rng(0)
    cases = {}
    for num_inputs, num_outputs in ((384, 40), (37, 5), (2, 16)):
        shape = (num_inputs, num_outputs)
        signs = random.choice([-1, 1], shape)
        cases |= {
            f"7bits-{num_inputs}": (63 * signs).astype(np.int8),
            f"8bits-{num_inputs}": (127 * signs).astype(np.int8),
            f"unsigned-{num_inputs}": (128 + 127 * signs).astype(np.uint8),
        }
    for name, weights in cases.items():
        write_product(tmp_path / name, weights)
    names = [str(tmp_path / name) for name in cases]
    printed = run_on_avx2([str(SUPPORT / "worst_products.py"), *names]).split()
    errors = dict(zip(cases, map(float, printed), strict=True))
    for name, error in errors.items():
        assert (error > 10_000) if name.startswith("8bits") else (error == 0), errors


def test_an_engine_scores_there_as_here(engine, official_pairs, run, tmp_path):
    batch = official_pairs.batch(PAIRS, 63)
    np.savez(tmp_path / "batch.npz", **{name: getattr(batch, name) for name in INPUTS})
    files = (engine, tmp_path / "batch.npz", tmp_path / "scores.npy")
    run_on_avx2([str(SUPPORT / "score_batch.py"), *map(str, files)])
    opened = open_engine(engine)
    here, there = run(opened, batch), np.load(tmp_path / "scores.npy")
    opened.close()
    assert np.abs(here - there).max() < ROUNDING
    assert np.corrcoef(there, official_pairs.expected(PAIRS))[0, 1] > 0.99
