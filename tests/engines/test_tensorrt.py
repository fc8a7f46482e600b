"""TensorRT's branches with a recording stand-in for its module; memory and scores are real."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from edje.arrays import DeviceArray
from edje.engines.build_options import BuildOptions
from edje.engines.contract import Batch, BuildJob, OpenOptions
from edje.engines.fidelity import InlineStream, score_host_batch
from edje.engines.registry import load_backend, require_builder
from edje.engines.tensorrt.build import PLAN
from edje.engines.tensorrt.library import MAX_MESSAGES, MessageLog, load_trt
from edje.errors import EngineError
from edje.runtime.cli.app import main
from pretended_gpu import GPU_NAME, pretend_gpu
from pretended_tensorrt import PLAN_BYTES, TIMINGS, Recording, make_tensorrt
from toy_engine import ToyEngine, toy_manifest

STREAM = SimpleNamespace(handle=1234, submit=None)


@pytest.fixture
def recording() -> Recording:
    return Recording()


@pytest.fixture
def machine(recording, monkeypatch, tmp_path):
    """A machine with a GPU and TensorRT."""
    machine = pretend_gpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(recording))
    monkeypatch.delitem(sys.modules, "edje.engines.tensorrt.backend", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_trt.cache_clear()
    yield machine
    sys.modules.pop("edje.engines.tensorrt.backend", None)
    load_trt.cache_clear()


@pytest.fixture
def tensorrt(machine):
    return load_backend("tensorrt")


@pytest.fixture
def manifest(tensorrt):
    return replace(
        toy_manifest(),
        backend="tensorrt",
        backend_version=tensorrt.version(),
        precision="fp16",
        device=tensorrt.device("fp16", BuildOptions()),
    )


def job(tmp_path, **options) -> BuildJob:
    out = tmp_path / "engine"
    out.mkdir(exist_ok=True)
    toy = toy_manifest()
    options = BuildOptions(**options)
    graph = tmp_path / "typed.onnx"
    return BuildJob(graph, out, "fp16", "float16", toy.profile, toy.bundle, options, print)


def batch(num_pairs: int = 3, bucket: int = 8) -> Batch:
    tokens = np.zeros((num_pairs, 4, 8), np.float16)
    tokens[:, 0, 0] = np.arange(num_pairs)
    text_ids = np.array([[2, 5, 6, 3], [2, 7, 3, 0]], np.int32)
    return Batch(
        text_ids=np.pad(text_ids, ((0, 0), (0, bucket - 4))),
        text_length=np.array([4, 3], np.int32),
        query_of_pair=np.arange(num_pairs, dtype=np.int32) % 2,
        visual_tokens=tokens,
    )


@pytest.fixture
def engine(tensorrt, manifest, tmp_path):
    (tmp_path / PLAN).write_bytes(PLAN_BYTES)
    engine = tensorrt.load(tmp_path, manifest, OpenOptions())
    yield engine
    engine.close()


def on_device(host: Batch) -> tuple[Batch, np.ndarray, DeviceArray]:
    """Return the batch as the engine takes it, and its scores on both sides."""

    def view(array):
        return DeviceArray(array.ctypes.data, array.shape, array.dtype)

    scores = np.full(len(host), np.nan, np.float32)
    names = ("text_ids", "text_length", "query_of_pair", "visual_tokens")
    return Batch(**{name: view(getattr(host, name)) for name in names}), scores, view(scores)


def test_building_sets_what_was_asked_for(tensorrt, recording, tmp_path):
    options = {"hardware_compatible": True, "version_compatible": True, "optimization_level": 5}
    flags = tensorrt.build(job(tmp_path, workspace_bytes=1 << 30, **options))
    assert (tmp_path / "engine" / PLAN).read_bytes() == PLAN_BYTES
    assert recording.named("create_network") == [(1 << 1,)]
    assert recording.named("clear_flag", "set_flag") == [("TF32",), ("VERSION_COMPATIBLE",)]
    assert recording.named("set_memory_pool_limit") == [("WORKSPACE", 1 << 30)]
    assert recording.named("builder_optimization_level") == [(5,)]
    assert recording.named("hardware_compatibility_level")[0][0].name == "AMPERE_PLUS"
    assert flags["optimization_level"] == 5
    assert flags["workspace_bytes"] == 1 << 30
    assert "report" not in flags


def test_every_bucket_has_a_profile_and_int8_tokens_bring_their_scales(
    tensorrt, recording, tmp_path
):
    tensorrt.build(job(tmp_path))
    assert len(recording.named("add_optimization_profile")) == 3
    shapes = recording.named("set_shape")
    assert [limits for name, limits in shapes if name == "text_ids"] == [
        ((1, bucket), (1, bucket), (8, bucket)) for bucket in (8, 16, 64)
    ]
    assert ("visual_tokens", ((1, 4, 8), (8, 4, 8), (8, 4, 8))) in shapes
    assert ("query_of_pair", ((1,), (8,), (8,))) in shapes
    recording.tensors["visual_tokens"] = ("INT8", (-1, 4, 8))
    recording.tensors["visual_scales"] = ("HALF", (-1, 4))
    tensorrt.build(replace(job(tmp_path), token_dtype="int8"))
    assert ("visual_scales", ((1, 4), (8, 4), (8, 4))) in recording.named("set_shape")


def test_a_second_build_reuses_the_timings(tensorrt, recording, tmp_path):
    tensorrt.build(job(tmp_path))
    path = tmp_path / "cache" / "edje" / "timings-NVIDIA-Stand-in-80GB-10.13.3.9.bin"
    assert path.read_bytes() == TIMINGS
    tensorrt.build(job(tmp_path))
    assert recording.named("set_timing_cache") == [(b"", False), (TIMINGS, False)]
    recording.refused.timing_cache = True
    tensorrt.build(job(tmp_path))
    assert recording.named("set_timing_cache")[2:] == [(TIMINGS, False), (b"", False)]
    assert [path.name for path in path.parent.iterdir()] == [path.name]


def test_a_refused_build_says_all_that_is_wrong_and_leaves_no_plan(tensorrt, recording, tmp_path):
    def faults(message):
        with pytest.raises(EngineError, match=message) as caught:
            tensorrt.build(job(tmp_path))
        assert not (tmp_path / "engine" / PLAN).exists()
        return caught.value.faults

    recording.refused.build = "out of  \n memory"
    assert faults("cannot build this graph in fp16") == ("out of memory",)
    recording.refused.parse = [("Gelu", "/a", "no\nsuch op"), ("Range", "/b", "wrong type")]
    assert faults(r"TensorRT 10.13.3.9 cannot read the graph") == (
        "node 0 (Gelu /a): no such op",
        "node 1 (Range /b): wrong type",
    )
    recording.refused.parse = []
    del recording.tensors["query_of_pair"]
    recording.tensors["visual_tokens"] = ("FLOAT", (-1, 4, 8))
    assert faults("not a joint encoder") == (
        "query_of_pair: missing",
        "visual_tokens: got FLOAT [-1, 4, 8], expected HALF [-1, 4, 8]",
    )


def test_progress_comes_a_line_a_step_and_what_it_raises_ends_the_build(tensorrt, tmp_path):
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tensorrt.build(replace(job(tmp_path), progress=stop))
    assert not (tmp_path / "engine" / PLAN).exists()
    lines = []
    tensorrt.build(replace(job(tmp_path), progress=lines.append))
    assert lines[:2] == ["Building engine: timing tactics", "Timing tactics, 1 of 4"]


def test_what_the_gpu_or_the_library_is_too_old_for_is_refused(
    tensorrt, machine, recording, monkeypatch
):
    reason = tensorrt.why_not_build("fp16", BuildOptions(compute_capabilities=("8.9",)))
    assert reason == "no compute_capabilities: it builds for the GPU of this machine"
    assert tensorrt.why_not_build("fp8", BuildOptions()) is None
    machine.capability = 7, 5
    for precision, least in (("fp8", "8.9"), ("bf16", "8.0")):
        needed = f"{precision} needs compute capability {least} or later, {GPU_NAME} has 7.5"
        assert tensorrt.why_not(precision) == needed
    assert tensorrt.why_not("int8") is None
    load_trt.cache_clear()
    del sys.modules["edje.engines.tensorrt.backend"]
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(recording, "8.6.1"))
    assert "8.6.1 is too old" in load_backend("tensorrt").why_not("fp16")


def test_the_manifest_names_the_gpu(tensorrt, manifest, machine):
    assert manifest.device["name"] == GPU_NAME
    assert manifest.device["cuda_version"] == "13.0"
    assert tensorrt.device_faults(manifest) == []
    machine.capability = 8, 0
    assert tensorrt.device_faults(manifest) == [
        "device compute capability: built on '9.0', this is '8.0'"
    ]
    portable = replace(manifest, device={**manifest.device, "hardware_compatible": True})
    assert tensorrt.device_faults(portable) == []


def test_shapes_and_addresses_come_before_the_run(engine, recording):
    host = batch()
    device, scores, device_scores = on_device(host)
    engine.enqueue(device, device_scores, stream=STREAM)
    names = recording.names()
    run = names.index("execute_async_v3")
    inputs = {"text_ids", "text_length", "query_of_pair", "visual_tokens"}
    before = recording.calls[:run]
    assert {call[1][0] for call in before if call[0] == "set_input_shape"} == inputs
    addressed = {call[1][0] for call in before if call[0] == "set_tensor_address"}
    assert addressed == {*inputs, "scores"}
    assert recording.calls[run][1] == (1234, 0)
    assert recording.named("set_optimization_profile_async") == [(0, 1234)]
    expected = np.empty(3, np.float32)
    ToyEngine().enqueue(host, expected, stream=InlineStream())
    np.testing.assert_array_equal(scores, expected)


def test_a_stream_has_one_context_a_bucket(engine, recording):
    other = SimpleNamespace(handle=99, submit=None)
    for stream, bucket in ((STREAM, 8), (STREAM, 8), (STREAM, 64), (other, 8), (STREAM, 64)):
        device, _, scores = on_device(batch(bucket=bucket))
        engine.enqueue(device, scores, stream=stream)
    assert recording.named("set_optimization_profile_async") == [(0, 1234), (2, 1234), (0, 99)]
    assert [profile for _, profile in recording.named("execute_async_v3")] == [0, 0, 2, 0, 2]
    allocations = [how.name for (how,) in recording.named("create_execution_context")]
    assert allocations == ["ON_PROFILE_CHANGE"] * 3


def test_host_arrays_are_refused_and_device_arrays_by_host_engines(engine):
    host = batch()
    device, scores, device_scores = on_device(host)
    with pytest.raises(EngineError, match="does not fit") as caught:
        engine.enqueue(host, scores, stream=STREAM)
    assert "in host memory, this engine takes GPU memory (DeviceArray)" in caught.value.faults[0]
    with pytest.raises(EngineError) as caught:
        ToyEngine().enqueue(device, device_scores, stream=InlineStream())
    assert "in GPU memory (DeviceArray), this engine takes host memory" in caught.value.faults[0]


def test_a_batch_outside_the_profile_is_refused(engine, recording):
    device, _, scores = on_device(batch(9))
    with pytest.raises(EngineError, match="does not fit") as caught:
        engine.enqueue(device, scores, stream=STREAM)
    assert caught.value.faults == ("pairs: got 9, expected 1 to 8",)
    device, _, scores = on_device(batch())
    queries = DeviceArray(device.text_ids.address, (9, 8), np.dtype("int32"))
    lengths = DeviceArray(device.text_length.address, (9,), np.dtype("int32"))
    many = replace(device, text_ids=queries, text_length=lengths)
    with pytest.raises(EngineError) as caught:
        engine.enqueue(many, scores, stream=STREAM)
    assert caught.value.faults == ("queries: got 9, expected at most 8 (one a pair)",)
    assert recording.named("execute_async_v3") == []


def test_a_failed_run_and_a_closed_engine(engine, recording):
    device, _, scores = on_device(batch())
    recording.refused.execute = True
    with pytest.raises(EngineError, match="TensorRT failed on a batch of 3"):
        engine.enqueue(device, scores, stream=STREAM)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.enqueue(device, scores, stream=STREAM)


def test_a_captured_forward_has_a_context_that_nothing_else_changes(engine, recording):
    assert engine.why_not_capture(STREAM, 8) is None
    host, other_host = batch(3), batch(5)
    device, views, scores = on_device(host)
    engine.enqueue(device, scores, stream=STREAM)
    expected = views.copy()
    forward = engine.capturable(device, scores, STREAM)
    assert len(recording.named("create_execution_context")) == 2
    other, _, other_scores = on_device(other_host)
    engine.enqueue(other, other_scores, stream=STREAM)
    recording.calls.clear()
    views[:] = np.nan
    forward(SimpleNamespace(handle=STREAM.handle))
    assert recording.names() == ["execute_async_v3"], "shapes and addresses are set before"
    assert np.array_equal(views, expected)
    recording.refused.execute = True
    with pytest.raises(EngineError, match="TensorRT failed on a batch of 3"):
        forward(STREAM)


def test_captured_forwards_of_a_stream_share_their_scratch_memory(engine, machine, recording):
    hosts = [batch(num_pairs) for num_pairs in (3, 2, 5, 4, 1)]
    kept = [on_device(host) for host in hosts]
    for device, _, scores in kept:
        engine.capturable(device, scores, STREAM)
    given = recording.named("set_device_memory")
    assert [size for _, size in given] == [1 << 22, 1 << 22, 1 << 23, 1 << 22, 1 << 22]
    assert len({address for address, _ in given}) == machine.alive["device"] == 2
    engine.capturable(*kept[0][::2], SimpleNamespace(handle=5))
    assert recording.named("set_device_memory")[-1][0] not in {address for address, _ in given}
    engine.close()
    assert not any(machine.alive.values()), machine.alive
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.capturable(*kept[0][::2], STREAM)


def test_a_host_batch_is_scored_on_the_device(engine, machine, recording):
    host = batch(5)
    expected = np.empty(5, np.float32)
    ToyEngine().enqueue(host, expected, stream=InlineStream())
    for _ in range(3):
        np.testing.assert_array_equal(score_host_batch(engine, host), expected)
        assert machine.alive["device"] == 0, "device memory was not freed"
        assert machine.alive["pinned"] == 1, "what arrays are staged in is made once"
        assert not machine.contexts, "a context was left on the thread"
    (stream,) = {stream for _, stream in machine.named("copy")}
    assert recording.named("set_optimization_profile_async") == [(0, stream)]
    assert machine.named("stream")[0].nonblocking
    wrong = replace(host, query_of_pair=np.full(5, 2, np.int32))
    with pytest.raises(EngineError, match="does not fit") as caught:
        score_host_batch(engine, wrong)
    assert "query_of_pair: got values from 2 to 2" in caught.value.faults[0]


def test_plans_that_do_not_open_and_settings_that_are_unknown(
    tensorrt, manifest, recording, tmp_path
):
    (tmp_path / PLAN).write_bytes(PLAN_BYTES)
    options = OpenOptions(num_threads=2, backend_settings={"runtime_cache": "x", "speed": "11"})
    with pytest.raises(EngineError, match="tensorrt cannot be opened so") as caught:
        tensorrt.load(tmp_path, manifest, options)
    assert caught.value.faults == (
        "runtime_cache: unknown setting",
        "speed: unknown setting",
        "num_threads: got 2, a GPU engine has no CPU threads",
    )
    recording.refused.deserialize = "the plan was built by another version"
    with pytest.raises(EngineError, match="cannot open") as caught:
        tensorrt.load(tmp_path, manifest, OpenOptions())
    assert caught.value.faults == ("the plan was built by another version",)
    recording.refused.deserialize = None
    portable = replace(manifest, build_options={"version_compatible": True})
    tensorrt.load(tmp_path, portable, OpenOptions()).close()
    assert recording.named("deserialize_cuda_engine")[-1] == (PLAN_BYTES, True)


def test_without_the_library_one_sentence_names_the_extra(tiny_bundle, tmp_path, capsys):
    if find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here")
    out = tmp_path / "engine"
    words = ["build", str(tiny_bundle), "--backend", "tensorrt", "--precision", "fp16"]
    assert main([*words, "--out", str(out)]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert shown == [
        "edje: the backend tensorrt cannot be loaded: TensorRT is not installed "
        "(no module named tensorrt)",
        "Hint: pip install 'edje-runtime[tensorrt]'",
    ]
    assert not out.exists()


def test_a_library_that_does_not_load(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "tensorrt":
                raise ImportError("libnvinfer.so.10: cannot open\nshared object file")

    load_trt.cache_clear()
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(EngineError, match="TensorRT is installed but does not load: libnvinfer"):
        require_builder("tensorrt", "fp16", BuildOptions())
    load_trt.cache_clear()


def test_the_log_keeps_the_latest_and_each_once():
    log = MessageLog()
    log.add("INFO", "not kept")
    for number in range(MAX_MESSAGES):
        log.add("ERROR", f"fault {number}")
    log.add("WARNING", "beware")
    log.add("INTERNAL_ERROR", "fault 63")
    assert log.errors() == [f"fault {number}" for number in range(1, 64)]
    log.clear()
    assert log.errors() == []


def test_device_arrays_slice_by_rows():
    array = DeviceArray(1000, (4, 3), np.dtype("float16"))
    assert array.nbytes == 24
    assert array[1:3] == DeviceArray(1006, (2, 3), np.dtype("float16"))
    assert array[3:1].shape == (0, 3)
    with pytest.raises(IndexError, match="got step 2"):
        array[::2]
