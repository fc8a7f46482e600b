"""What the driver says of the GPU here, and why there is none."""

import sys

import pytest

from edje.errors import EngineError
from edje.kernels.device import facts
from edje.kernels.device.facts import Gpu, capability_fault, capability_key, current_gpu, gpu_fault
from pretended_gpu import GPU_NAME, pretend_gpu


@pytest.fixture
def machine(monkeypatch):
    return pretend_gpu(monkeypatch)


def test_the_gpu_is_named_without_a_context(machine):
    assert gpu_fault() is None
    assert current_gpu() == Gpu(GPU_NAME, "9.0", "13.0")
    assert facts.current_index() == 0
    assert (machine.contexts, machine.alive) == ([], {}), "asking opens nothing"


def test_the_gpu_is_that_of_the_threads_context(machine, monkeypatch):
    monkeypatch.setattr(sys.modules[facts.BINDINGS], "cuCtxGetDevice", lambda: (0, 3))
    assert facts.current_index() == 3


def test_a_gpu_that_cannot_be_asked_says_so_in_one_sentence(machine, monkeypatch):
    machine.refused = "no CUDA-capable device is detected"
    monkeypatch.setattr(sys.modules[facts.BINDINGS], "cuInit", lambda flags: (100,))
    sentence = "CUDA failed in cuInit: no CUDA-capable device is detected"
    assert gpu_fault() == sentence
    with pytest.raises(EngineError, match=f"^{sentence}$"):
        current_gpu()


def test_a_driver_without_gpus(machine, monkeypatch):
    monkeypatch.setattr(sys.modules[facts.BINDINGS], "cuDeviceGetCount", lambda: (0, 0))
    assert gpu_fault() == "the NVIDIA driver sees no GPU"


def test_a_driver_is_asked_for_first(monkeypatch):
    monkeypatch.setattr(facts, "DRIVER", "libno-such-driver.so.1")
    assert gpu_fault() == "no NVIDIA driver here (libno-such-driver.so.1 is missing)"
    monkeypatch.setattr(facts, "DRIVER", None)  # ctypes then opens this very program
    monkeypatch.setitem(sys.modules, facts.BINDINGS, None)
    assert gpu_fault() == "cuda.bindings.driver is not installed here (pip install cuda-bindings)"


def test_capabilities_are_compared_as_numbers(machine):
    assert capability_key("8.9") < capability_key("12.0")
    assert capability_fault("fp8", "8.9") is None
    assert capability_fault("fp4", "12.0") == (
        f"fp4 needs compute capability 12.0 or later, {GPU_NAME} has 9.0"
    )


@pytest.mark.gpu
def test_a_real_gpu_is_named_as_its_device_is():
    pytest.importorskip("cuda.core")
    from edje.kernels.device.cuda_core import CudaCoreDevice

    device = CudaCoreDevice()
    gpu = current_gpu()
    assert gpu.name == device.name
    assert gpu.capability == "{}.{}".format(*device.compute_capability)
    assert capability_key(gpu.cuda_version) >= (12, 0)
    device.close()
