"""The rivals behind the engine contract: in which order ONNX Runtime's sessions end."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from edje.arrays import DeviceArray
from edje.bundle import BundleManifest
from edje.engines.contract import Batch
from edje.perf import gpu_contest as contest
from edje.perf import gpu_engines
from edje.perf.gpu_engines import CUDA_PROVIDER, OrtCudaEngine


class Session:
    """Of ONNX Runtime with its CUDA provider: what a run leaves, and what freeing it then does."""

    def __init__(self, log):
        self.log, self.left = log, 0

    def get_providers(self):
        return [CUDA_PROVIDER]

    def io_binding(self):
        return SimpleNamespace(bind_input=lambda *a: None, bind_output=lambda *a: None)

    def run_with_iobinding(self, binding, options):
        waits = options.entries.get("disable_synchronize_execution_providers") != "1"
        self.left = 0 if waits else self.left + 1
        self.log("run that waits" if waits else "run")

    def __del__(self):
        self.log("abort" if self.left else "freed")


class RunOptions:
    def __init__(self):
        self.entries = {}

    def add_run_config_entry(self, name, value):
        self.entries[name] = value


@pytest.fixture
def log(monkeypatch, pretended_gpu):
    """What sessions and the GPU did, in its order."""
    calls = pretended_gpu.calls
    library = SimpleNamespace(
        __version__="1.31.1",
        get_available_providers=lambda: [CUDA_PROVIDER],
        RunOptions=RunOptions,
        InferenceSession=lambda graph, providers: Session(lambda what: calls.append((what, None))),
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", library)
    return lambda: [name for name, _ in calls]


@pytest.mark.parametrize("num_runs", [0, 1, 3 * gpu_engines.WAITING_RUNS + 1])
def test_sessions_end_only_after_a_run_that_waited(tiny_bundle, log, num_runs):
    engine = OrtCudaEngine(tiny_bundle, "fp32", contest.profile_of([3], [8]))
    for stream in (SimpleNamespace(handle=7), SimpleNamespace(handle=8)):
        for _ in range(num_runs):
            engine.enqueue(*batch_on_gpu(tiny_bundle), stream=stream)
    engine.close()
    engine.close()
    done = log()
    assert "abort" not in done
    assert done.count("freed") == (2 if num_runs else 0)
    if num_runs:
        *_, last_run = (at for at, name in enumerate(done) if name == "run that waits")
        between = done[last_run : done.index("freed")]
        assert "synchronize" in between, "the GPU's callbacks were not waited for"


def test_few_runs_wait(tiny_bundle, log):
    engine = OrtCudaEngine(tiny_bundle, "fp32", contest.profile_of([3], [8]))
    for _ in range(2 * gpu_engines.WAITING_RUNS):
        engine.enqueue(*batch_on_gpu(tiny_bundle), stream=SimpleNamespace(handle=7))
    assert log().count("run that waits") == 2
    engine.close()


def test_its_runs_are_never_captured(tiny_bundle, log):
    """The callbacks that free host buffers would run again with every launch."""
    engine = OrtCudaEngine(tiny_bundle, "fp32", contest.profile_of([3], [8]))
    assert "callback" in engine.why_not_capture(SimpleNamespace(handle=7), 5)


def batch_on_gpu(bundle):
    """Return a batch of one pair, and where its score goes, at addresses that nobody reads."""
    sizes = BundleManifest.read(bundle).sizes
    shapes = (
        ((1, 5), "int32"),
        ((1,), "int32"),
        ((1,), "int32"),
        (
            (1, sizes.num_tokens, sizes.hidden),
            "float16",
        ),
    )
    arrays = [DeviceArray(64, shape, np.dtype(name)) for shape, name in shapes]
    return Batch(*arrays), DeviceArray(64, (1,), np.dtype("float32"))


PROGRAM = """
import sys
from pathlib import Path
from edje.perf import gpu_contest as contest
from edje.perf.gpu_engines import OrtCudaEngine
bundle = Path(sys.argv[1])
[pairs] = contest.make_pairs(bundle, [3], num_pairs=64)
engine = OrtCudaEngine(bundle, "fp16", contest.profile_of([3], [8]))
rows = contest.measure_point(engine, pairs, 8)
engine.close()
assert [row["fault"] for row in rows] == [None] * 3, rows
print("right")
"""


@pytest.mark.gpu
def test_a_process_with_the_cuda_provider_ends_cleanly(tiny_bundle):
    onnxruntime = pytest.importorskip("onnxruntime")
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime {onnxruntime.__version__} here has no {CUDA_PROVIDER}")
    command = [sys.executable, "-c", PROGRAM, str(tiny_bundle)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
