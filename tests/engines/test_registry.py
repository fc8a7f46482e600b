"""The registry: what this machine runs, and why not the rest."""

import sys

import pytest

from edje.engines import registry as backends
from edje.engines.cpu import cpu_features, describe_cpu
from edje.engines.manifest import PRECISIONS
from edje.engines.registry import REGISTRY, load_backend, probe_backends, require_backend
from edje.engines.tensorrt import library as trt_library
from edje.errors import EngineError


def test_names_are_those_of_the_manifest_and_every_cpu_runs_float32():
    gpus = {"native", "tensorrt", "tensorrt-rtx", "onnxruntime-cuda"}
    assert set(REGISTRY) == {"openvino", "onnxruntime", *gpus}
    assert {p for entry in REGISTRY.values() for p in entry.precisions} <= set(PRECISIONS)
    statuses = {status.name: status for status in probe_backends()}
    assert set(statuses) == set(REGISTRY)
    for name in ("onnxruntime", "openvino"):
        assert "fp32" in statuses[name].usable, "every CPU runs float32"
        assert statuses[name].version


def test_an_unknown_backend_or_precision_lists_what_runs():
    for name in ("tensorflow", "", "OpenVINO", "onnx-runtime"):
        with pytest.raises(EngineError, match="unknown backend") as caught:
            load_backend(name)
        assert "openvino (fp32" in caught.value.hint
        assert "onnxruntime (fp32" in caught.value.hint
    for backend in ("onnxruntime", "openvino"):
        with pytest.raises(EngineError, match="no precision 'fp64'") as caught:
            require_backend(backend, "fp64")
        assert "this machine can run" in caught.value.hint


def test_a_precision_without_hardware_is_refused(monkeypatch):
    module = load_backend("openvino")
    monkeypatch.setattr(module, "why_not", lambda p: "no units" if p == "bf16" else None)
    with pytest.raises(EngineError, match="openvino cannot run bf16 here: no units") as caught:
        require_backend("openvino", "bf16")
    assert "openvino (fp32" in caught.value.hint
    assert require_backend("openvino", "fp32") is module


def test_a_missing_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "edje.engines.openvino", raising=False)
    with pytest.raises(EngineError, match="the backend openvino cannot be loaded") as caught:
        load_backend("openvino")
    assert caught.value.hint == "pip install 'edje-runtime[cpu]'"
    status = {status.name: status for status in probe_backends()}["openvino"]
    assert status.version is None
    assert status.usable == ()
    for reasons in (status.runs, status.builds):
        assert all("pip install 'edje-runtime[cpu]'" in str(why) for why in reasons.values())


def test_what_builds_without_a_gpu_is_told_apart_from_what_runs(monkeypatch):
    rtx = pytest.importorskip("edje.engines.tensorrt.rtx", reason="needs the extra rtx")
    monkeypatch.setattr(rtx, "gpu_fault", lambda: "no NVIDIA driver here")
    (status,) = probe_backends(["tensorrt-rtx"])
    assert status.usable == ()
    assert status.buildable == ("fp32", "bf16", "fp16", "fp8")
    assert status.runs["fp16"] == "no NVIDIA driver here"
    assert "no int8" in status.builds["int8"]
    with pytest.raises(EngineError) as caught:
        require_backend("tensorrt-rtx", "fp16")
    assert "tensorrt-rtx (fp32, bf16, fp16, fp8)" in caught.value.hint


def test_without_the_passes_only_exported_graphs_build(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    module = load_backend("openvino")
    monkeypatch.setattr(module, "why_not", lambda precision: None)
    (status,) = probe_backends(["openvino"])
    assert status.usable == ("fp32", "bf16", "int8")
    assert status.buildable == ("fp32", "bf16")
    assert status.builds["int8"] == "needs onnx, ml_dtypes: pip install 'edje-runtime[build]'"
    monkeypatch.setattr(load_backend("onnxruntime-cuda"), "why_not", lambda precision: "no GPU")
    (status,) = probe_backends(["onnxruntime-cuda"])  # its float32 graph is read, to be emulated
    assert status.builds["fp32"] == "needs onnx, ml_dtypes: pip install 'edje-runtime[build]'"


def test_nothing_installed(monkeypatch):
    trt_library.load_trt.cache_clear()
    names = [name for names in trt_library.IMPORT_NAMES.values() for name in names]
    for library in ("openvino", "onnxruntime", *names):
        monkeypatch.setitem(sys.modules, library, None)
    modules = ("openvino", "onnxruntime", "onnxruntime_cuda", "tensorrt.backend", "tensorrt.rtx")
    for module in modules:
        monkeypatch.delitem(sys.modules, f"edje.engines.{module}", raising=False)
    with pytest.raises(EngineError) as caught:
        load_backend("cuda")
    assert "this machine can run none" in caught.value.hint


def test_the_registry_imports_no_library():
    import subprocess

    code = (
        "import sys, edje.engines.registry, edje.engines.registry, edje.engines.contract\n"
        "sys.exit(any(m in sys.modules for m in ('openvino', 'onnxruntime', 'onnx', 'torch',\n"
        "    'tensorrt', 'tensorrt_bindings', 'tensorrt_rtx', 'tensorrt_rtx_bindings')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_features_follow_the_precision(monkeypatch):
    usable = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni")
    monkeypatch.setattr("edje.machine.cpu_features", lambda: usable)
    assert cpu_features("fp32") == ("avx2", "fma", "avx512f")
    assert cpu_features("bf16") == ("avx2", "fma", "avx512f", "avx512_bf16")
    assert cpu_features("int8") == ("avx2", "fma", "avx512f", "avx512_vnni")
    assert cpu_features() == usable
    assert describe_cpu("fp32")["features"] == ["avx2", "fma", "avx512f"]
