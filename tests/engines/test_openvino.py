"""OpenVINO runs the precision it was asked for, or nothing."""

import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edje.bundle import INPUTS, JOINT_ENCODER
from edje.engines import openvino as ov
from edje.engines.builder.build import build_engine
from edje.engines.contract import OpenOptions
from edje.engines.manifest import EngineManifest
from edje.engines.openvino_core import openvino_core
from edje.engines.openvino_graph import widen_score
from edje.engines.registry import open_engine
from edje.errors import EngineError

# Largest |score difference| to the official float32 scores. bfloat16 keeps 8 bits of mantissa:
# 2**-8 relative a product; the fixture's scores reach 2.
BF16_TOLERANCE = 0.05

# The main thread's stack for signals, with no engine, with two, with the younger alone and with
# none, which another thread closed; then a signal.
SIGNAL_STACKS = """
import ctypes, gc, signal, sys
from pathlib import Path
from threading import Thread
from edje.engines.registry import open_engine

def stack():
    words = (ctypes.c_size_t * 3)()
    assert ctypes.CDLL(None).sigaltstack(None, words) == 0
    return words[0]

stacks = [stack()]
engines = [open_engine(Path(sys.argv[1])) for _ in range(2)]
stacks.append(stack())
engines.pop(0).close()
gc.collect()
stacks.append(stack())
closing = Thread(target=lambda: engines.pop().close())
closing.start()
closing.join()
gc.collect()
stacks.append(stack())
signal.signal(signal.SIGALRM, lambda *_: None)
signal.raise_signal(signal.SIGALRM)
print(len(set(stacks)))
"""


def compile_as(folder, precision):
    core = openvino_core()
    return core.compile_model(folder / ov.MODEL, "CPU", {ov.PRECISION_KEY: precision})


def test_a_model_compiled_in_another_precision_is_refused(built_engines):
    compiled = compile_as(built_engines["openvino"], "f32")
    ov.check_precision(compiled, "f32")
    with pytest.raises(EngineError, match=r"asked for bf16 but compiled .* \{'f32': \d+\}"):
        ov.check_precision(compiled, "bf16")


def test_the_precision_is_fixed_when_built_and_float32_weights_stay_so(built_engines, tiny_bundle):
    options = OpenOptions(backend_settings={"INFERENCE_PRECISION_HINT": "bf16"})
    with pytest.raises(EngineError, match="fixed when built"):
        open_engine(built_engines["openvino"], options)
    weights = (built_engines["openvino"] / "joint_encoder.bin").stat().st_size
    assert weights > 0.9 * (tiny_bundle / "joint_encoder.onnx").stat().st_size


@pytest.mark.parametrize(
    ("precision", "capabilities", "runs"),
    [
        ("fp32", ["FP32", "INT8"], True),
        ("bf16", ["FP32", "BF16", "INT8"], True),
        ("bf16", ["FP32", "INT8"], False),
        ("fp16", ["FP32", "FP16"], False),
    ],
)
def test_the_hardware_decides_what_runs(monkeypatch, precision, capabilities, runs):
    class Core:
        available_devices = ("CPU",)

        def get_property(self, device, name):
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return capabilities

    monkeypatch.setattr(ov, "openvino_core", Core)
    monkeypatch.delenv("EDJE_CPU_FEATURES", raising=False)
    assert (ov.why_not(precision) is None) == runs


@pytest.fixture(scope="module")
def bf16_engine(tiny_bundle, tmp_path_factory):
    if (reason := ov.why_not("bf16")) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("bf16") / "engine"
    build_engine(tiny_bundle, folder, backend="openvino", precision="bf16")
    return folder


def test_bfloat16_stays_close_to_float32(bf16_engine, official_pairs, run, monkeypatch):
    fidelity = EngineManifest.read(bf16_engine).fidelity
    assert 0 < fidelity["max_abs_diff"] < BF16_TOLERANCE
    engine = open_engine(bf16_engine)
    pairs = [(caption, image) for caption in range(5) for image in range(12)]
    scores = run(engine, official_pairs.batch(pairs, 63))
    engine.close()
    expected = official_pairs.expected(pairs)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=BF16_TOLERANCE)
    assert np.abs(scores - expected).max() > 0
    monkeypatch.setenv("EDJE_CPU_FEATURES", "avx2,fma,avx512f,asimd")
    assert "EDJE_CPU_FEATURES keeps this CPU's bfloat16" in ov.why_not("bf16")


def test_in_bfloat16_no_two_scores_are_tied_by_rounding(bf16_engine):
    """Scores rounded to bfloat16 would be multiples of 1/8 from 16 on."""
    infos = [
        node.get_rt_info()
        for node in compile_as(bf16_engine, "bf16").get_runtime_model().get_ordered_ops()
        if node.get_friendly_name() == "/classifier/MatMul"
    ]
    types = {i["layerType"].astype(str): i["runtimePrecision"].astype(str) for i in infos}
    assert types == {"Reduce": "f32"}


def test_a_wide_score_is_the_same_score(tiny_bundle, official_pairs):
    core = openvino_core()
    batch = official_pairs.batch([(0, image) for image in range(12)], 63)
    feed = {name: getattr(batch, name) for name in INPUTS}
    plain, wide = (core.read_model(tiny_bundle / JOINT_ENCODER) for _ in range(2))
    widen_score(wide)
    products = [
        sum(node.get_type_name() == "MatMul" for node in model.get_ordered_ops())
        for model in (plain, wide)
    ]
    assert products[0] - products[1] == 1
    scores = [
        core.compile_model(model, "CPU", {ov.PRECISION_KEY: "f32"})(feed)["scores"]
        for model in (plain, wide)
    ]
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=1e-5)


def test_bfloat16_is_refused_where_the_cpu_lacks_it(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(ov, "why_not", lambda precision: f"no {precision} units")
    with pytest.raises(EngineError, match="cannot build bf16 here: no bf16 units"):
        build_engine(tiny_bundle, tmp_path / "engine", backend="openvino", precision="bf16")
    assert not (tmp_path / "engine").exists()


class RecordedModel:
    """A compiled model of three streams that notes what its requests are asked."""

    def __init__(self, folder, fails=lambda waited: False):
        self._model = openvino_core().compile_model(
            folder / ov.MODEL, "CPU", {ov.PRECISION_KEY: "f32"}
        )
        self.fails, self.sizes, self.waited, self.events = fails, [], [], []

    def get_property(self, name):
        named = ("NUM_STREAMS", ov.THREADS_KEY)
        return 3 if name in named else self._model.get_property(name)

    def create_infer_request(self):
        return RecordedRequest(self, self._model.create_infer_request())


class RecordedRequest:
    def __init__(self, model, request):
        self._model, self._request = model, request

    def set_tensor(self, name, tensor):
        if name == "scores":
            self._model.sizes.append(tensor.shape[0])
        self._request.set_tensor(name, tensor)

    def start_async(self):
        self._model.events.append("start")
        self._request.start_async()

    def wait(self):
        self._model.events.append("wait")
        self._request.wait()
        self._model.waited.append(self)
        if self._model.fails(len(self._model.waited)):
            raise RuntimeError("broken")


def open_recorded(folder, **more):
    model = RecordedModel(folder, **more)
    return model, ov.OpenVinoEngine(EngineManifest.read(folder), lambda bucket: model)


def test_a_bucket_is_compiled_once_and_checked(built_engines, official_pairs, run, monkeypatch):
    lengths, check = [], ov.check_precision

    def watched(compiled, *wanted):
        lengths.append(compiled.input("text_ids").partial_shape[1].get_length())
        check(compiled, *wanted)

    monkeypatch.setattr(ov, "check_precision", watched)
    engine = open_engine(built_engines["openvino"])
    batches = [official_pairs.batch([(0, 0), (1, 1)], 63)] * 4
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda batch: run(engine, batch), batches))
    assert lengths == [min(engine.manifest.profile.text_buckets), 63]
    assert len({scores.tobytes() for scores in found}) == 1


def test_an_engine_that_is_in_use_is_not_compiled_again(
    built_engines, official_pairs, run, monkeypatch
):
    class Core:
        num_compiled = 0

        def __getattr__(self, name):
            return getattr(openvino_core(), name)

        def compile_model(self, *given):
            Core.num_compiled += 1
            return openvino_core().compile_model(*given)

    monkeypatch.setattr(ov, "openvino_core", Core)
    batch = official_pairs.batch([(0, 0), (1, 1)], 63)
    options = OpenOptions(backend_settings={"PERF_COUNT": "YES"})  # which no other test asks for
    first, second = (open_engine(built_engines["openvino"], options) for _ in range(2))
    expected = run(first, batch)
    np.testing.assert_array_equal(run(second, batch), expected)
    assert Core.num_compiled == 2  # of the smallest bucket and this one
    first.close()
    np.testing.assert_array_equal(run(second, batch), expected)
    second.close()
    gc.collect()
    open_engine(built_engines["openvino"], options).close()
    assert Core.num_compiled == 3, "nobody has it any more"


def test_every_thread_scores_pairs_of_its_own(built_engines, official_pairs, run):
    model, engine = open_recorded(built_engines["openvino"])
    pairs = [(caption, image) for caption in range(2) for image in range(5)]
    scores = run(engine, official_pairs.batch(pairs, 63))
    one = run(engine, official_pairs.batch(pairs[:1], 63))
    engine.close()
    assert model.sizes == [4, 3, 3, 1]
    np.testing.assert_allclose(scores, official_pairs.expected(pairs), rtol=0, atol=1e-4)
    np.testing.assert_allclose(one, scores[:1], rtol=0, atol=1e-5)


def test_no_stream_waits_for_another_before_the_batch_is_done(
    built_engines, official_pairs, run, monkeypatch
):
    pairs = [(caption, image) for caption in range(2) for image in range(6)]
    batch = official_pairs.batch(pairs, 63)
    rows = 63 + batch.visual_tokens.shape[1] + 1
    monkeypatch.setattr(ov, "ROWS_PER_THREAD", 2 * rows + rows // 2)
    model, engine = open_recorded(built_engines["openvino"])
    scores = run(engine, batch)
    assert model.sizes == [2] * 6
    assert model.events == ["start"] * 6 + ["wait"] * 6
    monkeypatch.setattr(ov, "ROWS_PER_THREAD", rows - 1)
    model, engine = open_recorded(built_engines["openvino"])
    np.testing.assert_array_equal(run(engine, batch), scores)
    assert model.sizes == [1] * 12
    monkeypatch.setattr(ov, "ROWS_PER_THREAD", 3 * rows)
    model, engine = open_recorded(built_engines["openvino"])
    run(engine, official_pairs.batch(pairs[:10], 63))
    assert model.sizes == [2, 2, 2, 2, 1, 1], "no stream has more requests than another"


def test_a_failure_waits_for_all_that_was_started(built_engines, official_pairs, run):
    model, engine = open_recorded(built_engines["openvino"], fails=lambda waited: waited == 2)
    batch = official_pairs.batch([(0, image) for image in range(6)], 63)
    with pytest.raises(EngineError, match="a batch of 6: broken"):
        run(engine, batch)
    assert len(model.waited) == 3
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        run(engine, batch)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of Linux")
def test_an_engine_leaves_every_thread_its_stack_for_signals(built_engines):
    command = [sys.executable, "-c", SIGNAL_STACKS, str(built_engines["openvino"])]
    made = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert made.stdout == "1\n", made.stderr
