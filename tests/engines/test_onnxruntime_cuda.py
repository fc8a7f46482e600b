"""ONNX Runtime's CUDA backend: what it refuses, on which stream it runs, how its sessions end."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from edje.arrays import DeviceArray
from edje.engines import registry
from edje.engines.build_options import BuildOptions
from edje.engines.builder.build import build_engine
from edje.engines.builder.options import EngineOptions
from edje.engines.builder.trial import trial_lines
from edje.engines.contract import Batch, OpenOptions
from edje.engines.fidelity import score_host_batch
from edje.engines.manifest import EngineManifest
from edje.engines.registry import load_backend, open_engine, probe_backends, require_builder
from edje.errors import EngineError
from edje.runtime.cli.app import main
from edje.runtime.reranker import Reranker
from pretended_gpu import GPU_NAME, pretend_gpu
from pretended_onnxruntime import PROVIDER, make_onnxruntime

NAME = "onnxruntime-cuda"
MODULES = ("onnxruntime_cuda", "onnxruntime_cuda_run")
SMALL = EngineOptions(max_pairs=16, text_buckets=[15])
PAIRS = [(0, 0), (1, 1), (0, 2)]


def install(monkeypatch, library):
    """Let `library` be the onnxruntime that the backend imports; return the backend."""
    monkeypatch.setitem(sys.modules, "onnxruntime", library)
    for module in MODULES:
        monkeypatch.delitem(sys.modules, f"edje.engines.{module}", raising=False)
    return load_backend(NAME)


@pytest.fixture(autouse=True)
def _real_modules_afterwards():
    yield
    for module in MODULES:
        sys.modules.pop(f"edje.engines.{module}", None)


@pytest.fixture(scope="module")
def folders(tiny_bundle, tmp_path_factory):
    """Engines built by the real library on this machine, whatever it can run."""
    out = tmp_path_factory.mktemp("ort-cuda")
    for precision in ("fp32", "fp16", "bf16"):
        build_engine(tiny_bundle, out / precision, backend=NAME, precision=precision, options=SMALL)
    return out


@pytest.fixture
def machine(monkeypatch):
    return pretend_gpu(monkeypatch)


@pytest.fixture
def backend(machine, monkeypatch):
    return install(monkeypatch, make_onnxruntime(machine))


@pytest.fixture
def as_built(folders, tmp_path):
    """Return what copies an engine's folder as if the pretended library had built it."""

    def copy(precision="fp32"):
        manifest = json.loads((folders / precision / "engine.json").read_text(encoding="utf-8"))
        manifest["backend_version"] = "1.31.1"
        out = tmp_path / precision
        out.mkdir()
        for name in manifest["files"]:
            (out / name).symlink_to(folders / precision / name)
        (out / "engine.json").write_text(json.dumps(manifest), encoding="utf-8")
        return out

    return copy


def done(machine):
    names = ("session", "run", "run that waits", "freed", "abort", "synchronize")
    return [name for name, _ in machine.calls if name in names]


def on_stream(batch, handle=7):
    """Return the arguments of `enqueue` for a host batch at the addresses it has."""
    names = ("text_ids", "text_length", "query_of_pair", "visual_tokens")
    host = {name: getattr(batch, name) for name in names}
    arrays = {n: DeviceArray(a.ctypes.data, a.shape, a.dtype) for n, a in host.items()}
    scores = np.full(len(batch), np.nan, np.float32)
    there = DeviceArray(scores.ctypes.data, scores.shape, scores.dtype)
    return (Batch(**arrays), there), SimpleNamespace(handle=handle, keeps=host), scores


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_building_needs_no_gpu_and_measures_the_graph(folders, precision, tiny_bundle):
    manifest = EngineManifest.read(folders / precision)
    least = {"fp32": "7.5", "fp16": "7.5", "bf16": "8.0"}[precision]
    assert manifest.device == {"kind": "cuda", "least_compute_capability": least}
    if load_backend(NAME).why_not(precision) is not None:
        assert manifest.fidelity["measured_on"] == "not measured on a device"
        assert manifest.fidelity["emulated"]["kendall_tau"] > 0.97


def test_eight_bits_are_refused_with_the_reason():
    for precision in ("int8", "fp8"):
        with pytest.raises(EngineError, match="no 8-bit products") as caught:
            require_builder(NAME, precision, BuildOptions())
        assert "build fp16" in caught.value.message


def test_options_of_other_backends_are_refused():
    with pytest.raises(EngineError, match="this backend has no report") as caught:
        require_builder(NAME, "fp16", BuildOptions(report=True))
    assert caught.value.hint == "leave out or change --report: see `edje build --help`"


def test_a_machine_without_a_driver_is_told_so_first(monkeypatch):
    from edje.kernels.device import facts

    monkeypatch.setattr(facts, "DRIVER", "libcuda-of-no-machine.so")
    (status,) = probe_backends([NAME])
    assert status.buildable == ("fp32", "bf16", "fp16")
    assert status.runs["fp16"] == "no NVIDIA driver here (libcuda-of-no-machine.so is missing)"


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (
            {"providers": ["CPUExecutionProvider"]},
            "pip uninstall onnxruntime onnxruntime-gpu, then",
        ),
        ({"cuda_version": "99.0"}, "needs libcudart.so.99, libcublas.so.99, libcublasLt.so.99"),
    ],
)
def test_what_the_library_lacks_is_named_with_what_mends_it(
    machine, monkeypatch, capsys, library, reason
):
    why_not = install(monkeypatch, make_onnxruntime(machine, **library)).why_not("fp16")
    assert reason in why_not
    assert "pip install" in why_not
    assert capsys.readouterr().out == "", "what the library prints would spoil --json"


def test_a_library_that_hides_what_it_leaves_to_the_cpu_is_refused(machine, monkeypatch):
    library = make_onnxruntime(machine)
    library.InferenceSession = object
    assert "cannot say which nodes" in install(monkeypatch, library).why_not("fp16")


def test_a_gpu_that_is_too_old_is_named(machine, backend, as_built):
    machine.capability = (7, 5)
    assert backend.why_not("fp16") is None
    assert backend.why_not("bf16") == (
        f"bf16 needs compute capability 8.0 or later, {GPU_NAME} has 7.5"
    )
    with pytest.raises(EngineError, match="is stale") as caught:
        open_engine(as_built("bf16"))
    assert "built for compute capability 8.0 and later" in caught.value.faults[0]


@pytest.mark.parametrize(("precision", "atol"), [("fp32", 1e-4), ("fp16", 2e-3)])
def test_scores_are_those_of_the_official_code(
    backend, machine, as_built, official_pairs, precision, atol
):
    engine = open_engine(as_built(precision))
    scores = score_host_batch(engine, official_pairs.batch(PAIRS, 15))
    np.testing.assert_allclose(scores, official_pairs.expected(PAIRS), rtol=0, atol=atol)
    assert engine.manifest.precision == precision
    engine.close()


def test_a_session_runs_on_its_stream_without_tf32(backend, machine, as_built, official_pairs):
    settings = {"gpu_mem_limit": "4000000000", "arena_extend_strategy": "kSameAsRequested"}
    engine = open_engine(as_built(), OpenOptions(backend_settings=settings))
    for handle in (7, 8, 7):
        arrays, stream, scores = on_stream(official_pairs.batch(PAIRS, 15), handle)
        engine.enqueue(*arrays, stream=stream)
        np.testing.assert_allclose(scores, official_pairs.expected(PAIRS), rtol=0, atol=1e-4)
    common = {"device_id": "0", "use_tf32": "0", **settings}
    assert machine.named("session") == [
        {"user_compute_stream": handle, **common} for handle in ("7", "8")
    ]
    engine.close()


def test_the_default_stream_is_refused(backend, as_built, official_pairs):
    engine = open_engine(as_built())
    arrays, stream, _ = on_stream(official_pairs.batch(PAIRS, 15), handle=0)
    with pytest.raises(EngineError, match="default stream"):
        engine.enqueue(*arrays, stream=stream)
    engine.close()


@pytest.mark.parametrize(
    ("library", "fault"),
    [
        ({"starts": False}, f"could not start {PROVIDER} and would run on CPUExecutionProvider"),
        ({"on_cpu": ["/mask/Less", "/mask/Where"]}, "leaves 2 nodes to the CPU"),
    ],
)
def test_nothing_runs_on_the_cpu_in_silence(
    machine, monkeypatch, as_built, official_pairs, library, fault
):
    install(monkeypatch, make_onnxruntime(machine, **library))
    engine = open_engine(as_built())
    arrays, stream, scores = on_stream(official_pairs.batch(PAIRS, 15))
    with pytest.raises(EngineError, match=fault) as caught:
        engine.enqueue(*arrays, stream=stream)
    if "on_cpu" in library:
        assert "/mask/Less (Less): CPUExecutionProvider" in caught.value.faults
    assert np.isnan(scores).all()
    engine.close()
    assert "abort" not in done(machine)


def test_all_wrong_settings_come_at_once(backend, as_built):
    settings = {"gpu_mem_limit": "4 GB", "arena_extend_strategy": "grow", "use_tf32": "1"}
    with pytest.raises(EngineError, match="cannot be opened so") as caught:
        open_engine(as_built(), OpenOptions(num_threads=2, backend_settings=settings))
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        *("use_tf32", "gpu_mem_limit", "arena_extend_strategy", "num_threads")
    ]
    with pytest.raises(EngineError, match="cannot be opened so") as caught:
        open_engine(as_built("fp16"), OpenOptions(backend_settings={"gpu_mem_limit": "9"}))
    assert "got 9, the weights alone take" in caught.value.faults[0]


@pytest.mark.parametrize("num_runs", [0, 1, 2 * 64 + 1])
def test_sessions_end_only_after_a_run_that_waited(
    backend, machine, as_built, official_pairs, num_runs
):
    engine = open_engine(as_built())
    for handle in (7, 8):
        arrays, stream, _ = on_stream(official_pairs.batch(PAIRS[:1], 15), handle)
        for _ in range(num_runs):
            engine.enqueue(*arrays, stream=stream)
    assert done(machine).count("run that waits") == 2 * (num_runs // 64)
    engine.close()
    engine.close()
    ended = done(machine)
    assert "abort" not in ended
    assert ended.count("freed") == (2 if num_runs else 0)
    if num_runs:
        *_, last_run = (at for at, name in enumerate(ended) if name == "run that waits")
        between = ended[last_run : ended.index("freed")]
        assert "synchronize" in between, "the GPU's callbacks were not waited for"
        with pytest.raises(EngineError, match="closed"):
            engine.enqueue(*arrays, stream=stream)


def test_an_engine_that_nobody_closed_ends_as_if_somebody_had(
    backend, machine, as_built, official_pairs
):
    engine = open_engine(as_built())
    arrays, stream, _ = on_stream(official_pairs.batch(PAIRS, 15))
    engine.enqueue(*arrays, stream=stream)
    del engine
    assert done(machine)[-1] == "freed"
    assert "abort" not in done(machine)


def test_its_runs_are_never_captured(backend, as_built):
    """The callbacks that free host buffers would run again with every launch."""
    engine = open_engine(as_built())
    assert "callback" in engine.why_not_capture(SimpleNamespace(handle=7), 15)
    engine.close()


def test_auto_times_it_on_the_gpu_and_says_why_not_the_rest(
    backend, machine, monkeypatch, tiny_bundle, tmp_path
):
    few = {name: registry.REGISTRY[name] for name in ("onnxruntime-cuda", "tensorrt-rtx")}
    monkeypatch.setattr(
        "edje.engines.builder.auto.probe_backends", lambda: probe_backends(tuple(few))
    )
    monkeypatch.setattr(backend, "LEAST_CAPABILITY", {"fp32": "7.5", "fp16": "7.5", "bf16": "99.0"})
    manifest = build_engine(tiny_bundle, tmp_path / "engine", options=SMALL)
    assert manifest.backend == NAME
    assert manifest.fidelity["measured_on"].endswith(f" on {GPU_NAME}")
    trials = {(t["backend"], t["precision"]): t for t in manifest.build_options["auto"]}
    assert trials[NAME, "fp32"]["pairs_per_s"] > 0
    assert trials[NAME, "fp16"]["pairs_per_s"] > 0
    assert "compute capability 99.0" in trials[NAME, "bf16"]["not_tried"]
    assert "no 8-bit products" in trials[NAME, "fp8"]["not_tried"]
    assert all(t["not_tried"] for (name, _), t in trials.items() if name == "tensorrt-rtx")
    lines = dict(trial_lines(manifest.build_options["auto"]))
    assert next(iter(lines)) == f"{NAME} {manifest.precision}"
    assert "abort" not in done(machine)


def test_a_reranker_ranks_as_on_the_cpu(backend, machine, as_built, tiny_engine, tiny_store):
    with Reranker.open(tiny_engine, store=tiny_store) as reranker:
        expected = reranker.rank("a red kite", top_k=12)
    with Reranker.open(as_built(), store=tiny_store) as reranker:
        found = reranker.rank("a red kite", top_k=12)
    assert found.engine.backend == NAME
    assert [hit.id for hit in found.hits] == [hit.id for hit in expected.hits]
    for ours, theirs in zip(found.hits, expected.hits, strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=1e-4)
    assert "abort" not in done(machine)


def test_the_doctor_knows_it(capsys):
    assert main(["doctor", "--json"]) == 0
    statuses = {s["name"]: s for s in json.loads(capsys.readouterr().out)["backends"]}
    assert statuses[NAME]["buildable"] == ["fp32", "bf16", "fp16"]
    assert "no 8-bit products" in statuses[NAME]["runs"]["int8"]


PROGRAM = """
import sys
from edje.engines.fidelity import measure_fidelity
from edje.engines.registry import open_engine
from pathlib import Path
engine = open_engine(sys.argv[1])
found = measure_fidelity(engine, Path(sys.argv[2]))
for _ in range(2):
    measure_fidelity(engine, Path(sys.argv[2]))
if sys.argv[3] == "closed":
    engine.close()
print("tau", found["kendall_tau"], "largest", found["max_abs_diff"])
"""


@pytest.mark.gpu
@pytest.mark.parametrize("end", ["closed", "left open"])
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-3), ("fp16", 1e-2), ("bf16", 0.1)])
def test_a_card_scores_as_float32_and_the_process_ends_cleanly(
    tiny_bundle, tmp_path, precision, most, end
):
    why_not = importlib.import_module("edje.engines.onnxruntime_cuda").why_not(precision)
    if why_not is not None:
        pytest.skip(why_not)
    out = tmp_path / "engine"
    build_engine(tiny_bundle, out, backend=NAME, precision=precision, options=SMALL)
    command = [sys.executable, "-c", PROGRAM, str(out), str(tiny_bundle), end]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    _, tau, _, largest = run.stdout.split()
    assert float(tau) >= 0.97
    assert float(largest) <= most
