"""Real TensorRT-RTX plans, built with no GPU and no driver, and read back from the builder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edje.arrays import DeviceArray
from edje.bundle import JOINT_ENCODER, BundleManifest
from edje.engines.build_options import BuildOptions
from edje.engines.builder.build import build_engine
from edje.engines.builder.options import EngineOptions
from edje.engines.contract import Batch, BuildJob, OpenOptions
from edje.engines.fidelity import Fidelity, measure_fidelity
from edje.engines.manifest import PRECISIONS, QUANTIZED, EngineManifest, Profile
from edje.engines.precision.graph import Graph
from edje.engines.precision.lower import lower
from edje.engines.precision.prepare import take_int8_tokens
from edje.engines.precision.static import find_linears, quantize
from edje.engines.registry import load_backend, open_engine, require_backend, require_builder
from edje.engines.samples import RandomSamples
from edje.engines.tensorrt.build import PLAN, REPORT, read_report
from edje.engines.tensorrt.run import TrtEngine, open_plan, read_settings
from edje.errors import EngineError
from edje.kernels.device import facts
from pretended_gpu import pretend_gpu
from pretended_tensorrt import KERNELS, Recording, RtxEngine
from toy_engine import toy_manifest

pytest.importorskip("tensorrt_rtx_bindings", reason="needs the extra rtx")
TAKEN = tuple(precision for precision in PRECISIONS if precision != "int8")


@pytest.fixture(scope="module")
def rtx():
    return load_backend("tensorrt-rtx")


def typed_graph(bundle: Path, out: Path, rtx, precision: str, token_dtype: str = "float16") -> Path:
    """Write the bundle's graph in a precision; scales are guessed: they change no kernel."""
    graph = Graph.read(bundle / JOINT_ENCODER)
    if precision in QUANTIZED:
        amax = {linear.value: 8.0 for linear in find_linears(graph)}
        graph = quantize(graph, precision, amax, scale_type="float16")
    if rtx.compute_type(precision) != "float32":
        graph = lower(graph, rtx.compute_type(precision))
    if token_dtype == "int8":
        graph = take_int8_tokens(graph)
    graph.write(out)
    return out


@pytest.fixture(scope="module")
def full_size_graphs(full_size_bundle, rtx, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("graphs")
    return {
        precision: typed_graph(full_size_bundle, folder / f"{precision}.onnx", rtx, precision)
        for precision in ("fp32", "fp16", "fp8")
    }


def make_job(graph: Path, out: Path, bundle: Path, precision: str, **changes) -> BuildJob:
    out.mkdir(exist_ok=True)
    options = BuildOptions(report=True, compute_capabilities=changes.pop("capabilities", ()))
    profile = Profile(256, changes.pop("buckets", (24,)))
    manifest = BundleManifest.read(bundle)
    dtype = changes.pop("token_dtype", "float16")
    return BuildJob(graph, out, precision, dtype, profile, manifest, options, lambda _: None)


def tensors_of(folder: Path) -> dict[str, dict]:
    values = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return {tensor["name"]: tensor for tensor in values["tensors"]}


def check_tensors(folder: Path, job: BuildJob) -> None:
    """Check names, types, shapes and every profile's limits of a plan against the contract."""
    sizes, buckets = job.bundle.sizes, job.profile.text_buckets
    tokens = [sizes.num_tokens, sizes.hidden]
    token_type = "Int8" if job.token_dtype == "int8" else "Half"
    found = tensors_of(folder)
    text_slots = buckets[0] if len(buckets) == 1 else -1
    expected = {
        "text_ids": ("Input", "Int32", [-1, text_slots]),
        "text_length": ("Input", "Int32", [-1]),
        "query_of_pair": ("Input", "Int32", [-1]),
        "visual_tokens": ("Input", token_type, [-1, *tokens]),
        "scores": ("Output", "Float", [-1]),
    }
    if job.token_dtype == "int8":
        expected["visual_scales"] = ("Input", "Half", [-1, sizes.num_tokens])
    described = {name: (t["mode"], t["dtype"], t["shape"]) for name, t in found.items()}
    assert described == expected
    assert found["text_ids"]["limits"] == [[[1, t], [1, t], [256, t]] for t in buckets]
    assert found["query_of_pair"]["limits"] == [[[1], [256], [256]]] * len(buckets)
    limits = [[[1, *tokens], [256, *tokens], [256, *tokens]]] * len(buckets)
    assert found["visual_tokens"]["limits"] == limits


@pytest.mark.parametrize(
    ("precision", "capability"),
    [("fp32", "8.9"), ("fp16", "8.0"), ("fp16", "12.0"), ("fp8", "8.9")],
)
def test_full_size_builds_for_a_gpu_that_is_not_here(
    rtx, full_size_bundle, full_size_graphs, tmp_path, precision, capability
):
    where = (full_size_graphs[precision], tmp_path / "engine", full_size_bundle, precision)
    job = make_job(*where, capabilities=(capability,))
    flags = rtx.build(job)
    check_tensors(job.out, job)
    # One kernel for scores, softmax and context in 16 bit; float32 has one for the last layer's
    # single row only.
    assert flags["attention"] == {"layers": 12, "fused": 1 if precision == "fp32" else 12}
    assert flags["compute_capabilities"] == [capability]
    plan_bytes = (job.out / PLAN).stat().st_size
    weight_bytes = {"fp32": 4, "fp16": 2, "fp8": 1}[precision] * 21_000_000
    assert weight_bytes < plan_bytes < weight_bytes + 90_000_000
    kernels = json.loads((job.out / REPORT).read_text(encoding="utf-8"))["layers"]
    products = [layer for layer in kernels if layer["kind"] == "gemm"]
    in_layers = [layer for layer in products if layer["nodes"] and "/layers.5/" in layer["name"]]
    expected = {"fp32": "Float", "fp16": "Half", "fp8": "FP8"}[precision]
    assert in_layers
    assert all(expected in layer["types"] for layer in in_layers)


@pytest.mark.slow
def test_full_size_with_every_bucket_for_every_gpu(
    rtx, full_size_bundle, full_size_graphs, tmp_path
):
    buckets = (16, 24, 32, 48, 64)
    where = (full_size_graphs["fp16"], tmp_path / "engine", full_size_bundle, "fp16")
    job = make_job(*where, buckets=buckets)
    flags = rtx.build(job)
    check_tensors(job.out, job)
    assert flags["attention"] == {"layers": 12, "fused": 12}
    assert "compute_capabilities" not in flags
    values = json.loads((job.out / REPORT).read_text(encoding="utf-8"))
    assert {layer["profile"] for layer in values["layers"]} == set(range(len(buckets)))


@pytest.mark.parametrize("precision", TAKEN)
def test_the_tiny_model_becomes_an_engine_folder(tiny_bundle, tmp_path, precision):
    lines = []
    manifest = build_engine(
        tiny_bundle,
        tmp_path / "engine",
        backend="tensorrt-rtx",
        precision=precision,
        calibration=RandomSamples(BundleManifest.read(tiny_bundle)),
        options=EngineOptions(
            max_pairs=32,
            text_buckets=(16, 64),
            backend_options=BuildOptions(report=True, compute_capabilities=("12.0", "8.9")),
        ),
        progress=lines.append,
    )
    assert set(manifest.files) == {PLAN, REPORT, "tokenizer.json"}
    assert manifest.device == {
        "kind": "cuda",
        "compute_capabilities": ["8.9", "12.0"],
        "least_compute_capability": "8.9",
    }
    assert manifest.backend_version.startswith("1.")
    assert EngineManifest.read(tmp_path / "engine") == manifest
    assert any("Optimizing graph" in line for line in lines)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_int8_tokens(rtx, tiny_bundle, tmp_path, precision):
    graph = typed_graph(tiny_bundle, tmp_path / "typed.onnx", rtx, precision, "int8")
    job = make_job(graph, tmp_path / "engine", tiny_bundle, precision, token_dtype="int8")
    rtx.build(job)
    check_tensors(job.out, job)


@pytest.mark.parametrize(
    ("precision", "options", "sentence"),
    [
        ("int8", {}, "TensorRT-RTX has no int8 activations; build fp8"),
        ("fp8", {"compute_capabilities": ("8.0", "8.9")}, "fp8 needs compute capability 8.9, got"),
        ("fp16", {"compute_capabilities": ("7.5",)}, "fp16 needs compute capability 8.0, got 7.5"),
        ("fp16", {"compute_capabilities": ("9.0",)}, "compute capability 9.0 is none of its own"),
        ("fp16", {"compute_capabilities": ("5.0",)}, "compute capability 5.0 is none of its own"),
        ("fp16", {"hardware_compatible": True}, "no hardware_compatible"),
        ("fp16", {"version_compatible": True}, "no version_compatible"),
    ],
)
def test_what_it_refuses_is_said_in_one_sentence(precision, options, sentence):
    with pytest.raises(EngineError, match=sentence) as caught:
        require_builder("tensorrt-rtx", precision, BuildOptions(**options))
    assert caught.value.message.startswith(f"tensorrt-rtx cannot build {precision} here: ")


def test_without_a_driver_nothing_opens(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "DRIVER", "libno-such-driver.so.1")
    folder = tmp_path / "engine"
    manifest = build_engine(
        tiny_bundle,
        folder,
        backend="tensorrt-rtx",
        precision="fp32",
        options=EngineOptions(text_buckets=(16,)),
    )
    assert Fidelity.from_json(manifest.fidelity) is None
    with pytest.raises(EngineError, match=r"cannot run here: .* no NVIDIA driver here"):
        open_engine(folder)


def test_a_plan_the_library_calls_invalid_is_not_opened(rtx, tmp_path):
    if facts.gpu_fault() is None:
        pytest.skip("a GPU is here")
    (tmp_path / PLAN).write_bytes(b"no plan at all" * 1000)
    settings = read_settings(rtx.LIBRARY, OpenOptions(), None)
    with pytest.raises(EngineError, match="cannot run here"):
        open_plan(rtx.LIBRARY, tmp_path, toy_manifest(), settings)


@pytest.fixture
def gpu(rtx, monkeypatch):
    """Call it to have a GPU of a compute capability here."""

    def be(capability: str) -> None:
        here = facts.Gpu("NVIDIA Stand-in 80GB", capability, "13.0")
        monkeypatch.setattr(rtx, "gpu_fault", lambda: None)
        monkeypatch.setattr(rtx, "current_gpu", lambda: here)

    return be


def built_for(least: str, *capabilities: str) -> EngineManifest:
    device = {"compute_capabilities": list(capabilities), "least_compute_capability": least}
    return replace(toy_manifest(), device={"kind": "cuda", **device})


@pytest.mark.parametrize(
    ("named", "words"), [(("8.9", "12.0"), "8.9, 12.0"), ((), "8.9 and later")]
)
def test_the_gpu_must_be_one_it_was_built_for(rtx, gpu, named, words):
    gpu("12.0")
    assert rtx.device_faults(built_for("8.9", *named)) == []
    gpu("8.6")
    fault = f"device: built for compute capability {words}, NVIDIA Stand-in 80GB has 8.6"
    assert rtx.device_faults(built_for("8.9", *named)) == [fault]


@pytest.mark.parametrize("capability", ["9.0", "10.0"])
def test_a_gpu_the_library_does_not_serve_is_told_what_runs_there(rtx, gpu, capability):
    """It builds for such a GPU without a word, and then refuses to open there."""
    gpu(capability)
    sentence = f"does not serve compute capability {capability} (NVIDIA Stand-in 80GB), only 7.5"
    for_every_gpu = rtx.why_not_build("fp16", BuildOptions())
    for reason in (rtx.why_not("fp16"), *rtx.device_faults(built_for("8.0")), for_every_gpu):
        assert sentence in reason
        assert "data-centre GPUs (9.0, 10.0) run the tensorrt backend" in reason
    assert "--compute-capability" in for_every_gpu
    assert rtx.why_not_build("fp16", BuildOptions(compute_capabilities=("8.9",))) is None


def rtx_engine(rtx, folder: Path, recording: Recording, **settings) -> TrtEngine:
    read = read_settings(
        rtx.LIBRARY, OpenOptions(backend_settings=settings), folder / "runtime_cache.8.9.bin"
    )
    return TrtEngine(rtx.LIBRARY, toy_manifest(), None, RtxEngine(recording), read)


def test_compiled_kernels_are_kept_beside_the_plan(rtx, tmp_path):
    recording, stream = Recording(), SimpleNamespace(handle=5)
    engine = rtx_engine(rtx, tmp_path, recording, cuda_graph_strategy="whole_graph_capture")
    assert engine.cuda_graph_strategy == "whole_graph_capture"
    engine.context(stream, 16)
    engine.close()
    kept = tmp_path / "runtime_cache.8.9.bin"
    assert kept.read_bytes() == KERNELS
    allocations = recording.named("set_execution_context_allocation_strategy")
    assert allocations == [("ON_PROFILE_CHANGE",)]
    (strategy,) = recording.named("cuda_graph_strategy")
    assert strategy == (rtx.LIBRARY.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE,)
    again = Recording()
    rtx_engine(rtx, tmp_path, again, dynamic_shapes_kernel_specialization_strategy="eager").close()
    assert again.named("cache.deserialize") == [(KERNELS,)]
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_captures_are_left_to_who_can_do_them(rtx, tmp_path, monkeypatch):
    """A graph keeps the kernels of its capture, so they must be the last ones."""
    stream = SimpleNamespace(handle=5)

    def why_not(**settings):
        return rtx_engine(rtx, tmp_path, Recording(), **settings).why_not_capture(stream, 8)

    kernels = "dynamic_shapes_kernel_specialization_strategy"
    assert "captures graphs itself" in why_not(cuda_graph_strategy="whole_graph_capture")
    assert f"set {kernels} to eager or none" in why_not()
    assert f"set {kernels} to eager or none" in why_not(**{kernels: "lazy"})
    assert why_not(**{kernels: "eager"}) is None
    refuses = "pretended_tensorrt.ExecutionContext.is_stream_capturable"
    monkeypatch.setattr(refuses, lambda context, handle: handle != 5, raising=False)
    assert "cannot be captured" in why_not(**{kernels: "eager"})


def test_a_captured_forward_has_its_allocation_from_the_configuration(rtx, tmp_path, monkeypatch):
    recording, machine = Recording(), pretend_gpu(monkeypatch)
    engine = rtx_engine(rtx, tmp_path, recording)
    array = np.zeros(64, np.int32)
    views = {
        "text_ids": (1, 8),
        "text_length": (1,),
        "query_of_pair": (2,),
        "visual_tokens": (2, 4, 8),
    }
    batch = Batch(**{n: DeviceArray(array.ctypes.data, s, array.dtype) for n, s in views.items()})
    engine.capturable(batch, batch.query_of_pair, SimpleNamespace(handle=5))
    engine.context(SimpleNamespace(handle=5), 8)
    allocations = recording.named("set_execution_context_allocation_strategy")
    assert allocations == [("USER_MANAGED",), ("ON_PROFILE_CHANGE",)]
    ((address, size),) = recording.named("set_device_memory")
    assert (list(machine.memory), size) == ([address], 1 << 21)
    engine.close()
    assert machine.memory == {}


def test_a_folder_that_cannot_be_written_is_no_fault_and_a_wrong_strategy_is(rtx, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    engine = rtx_engine(rtx, blocked, Recording())
    engine.context(SimpleNamespace(handle=5), 8)
    assert not engine.save_runtime_cache()
    engine.close()
    none = rtx_engine(rtx, tmp_path, Recording(), runtime_cache="none")
    assert not none.save_runtime_cache()
    with pytest.raises(EngineError) as caught:
        rtx_engine(rtx, tmp_path, Recording(), cuda_graph_strategy="always")
    assert caught.value.faults == (
        "cuda_graph_strategy: got 'always', expected disabled or whole_graph_capture",
    )


def test_a_report_of_another_form_is_empty():
    report = read_report("Layer(Constant): something else\n")
    assert report["layers"] == report["tensors"] == []
    assert report["attention"] == {"layers": 0, "fused": 0}


def test_the_stand_in_has_no_call_that_the_library_lacks(rtx):
    import pretended_tensorrt

    real = rtx.LIBRARY.module
    pairs = {
        real.Builder: pretended_tensorrt.Builder,
        real.INetworkDefinition: pretended_tensorrt.Network,
        real.IBuilderConfig: pretended_tensorrt.Config,
        real.Runtime: pretended_tensorrt.Runtime,
        real.ICudaEngine: pretended_tensorrt.RtxEngine,
        real.IExecutionContext: pretended_tensorrt.ExecutionContext,
        real.OnnxParser: pretended_tensorrt.OnnxParser,
    }
    for kind, stand_in in pairs.items():
        names = {name for name in vars(stand_in) if not name.startswith("_")} - {"recording"}
        assert names <= set(dir(kind)), stand_in


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_gpu_ranks_as_float32_does(tiny_bundle, tmp_path, backend, precision):
    try:
        require_builder(backend, precision, BuildOptions())
        require_backend(backend, precision)  # a library, or this GPU's compute capability
    except EngineError as error:
        pytest.skip(str(error))
    samples = RandomSamples(BundleManifest.read(tiny_bundle))
    folder = tmp_path / "engine"
    build_engine(
        tiny_bundle,
        folder,
        backend=backend,
        precision=precision,
        calibration=samples,
        options=EngineOptions(text_buckets=(16, 64)),
    )
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    engine = open_engine(copy)
    found = measure_fidelity(engine, tiny_bundle, samples)
    engine.close()
    assert found["kendall_tau"] > {"fp32": 0.99, "fp8": 0.8, "int8": 0.8}.get(precision, 0.95)
    assert np.isfinite(found["max_abs_diff"])
