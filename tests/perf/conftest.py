"""A pretended GPU for what is measured on one."""

import sys

import pytest

from edje.kernels.device import facts as cuda_memory
from edje.kernels.device.cuda_core import CudaCoreDevice
from recording_cuda import pretend_gpu
from recording_trt import Recording, make_cuda_runtime


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Device memory is host memory, so both ways of an engine on a GPU run for real."""
    machine = pretend_gpu(monkeypatch)
    cached = (cuda_memory._cudart, cuda_memory.current_gpu, cuda_memory.measuring_stream)
    # The stand-in lends no stream that can wait; the pipeline gets one of its own.
    monkeypatch.setattr(CudaCoreDevice, "borrow", lambda device, stream: device.stream())
    monkeypatch.setitem(sys.modules, cuda_memory.RUNTIME, make_cuda_runtime(Recording()))
    for function in cached:
        function.cache_clear()
    yield machine
    for function in cached:
        function.cache_clear()
