"""Host arrays on a GPU and back, all of a process in the order of one stream."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edje.errors import EngineError
from edje.kernels.device.measuring import GpuArrays, gpu_arrays
from pretended_gpu import array_at, pretend_gpu


@pytest.fixture
def machine(monkeypatch):
    return pretend_gpu(monkeypatch)


def check_round_trip(gpu: GpuArrays) -> None:
    random = np.random.default_rng(3)
    for shape, dtype in (((3, 5), "float16"), ((1,), "int32"), ((7, 2, 4), "int8"), ((0,), "int8")):
        array = random.integers(-99, 99, shape).astype(dtype)
        copy = gpu.upload(array)
        assert (copy.shape, copy.dtype) == (shape, array.dtype)
    one, other = gpu.result((4, 2), "float32"), gpu.result((3,), "float32")
    assert [array.shape for array in gpu.download(one, other, one)] == [(4, 2), (3,), (4, 2)]


def test_arrays_come_back_as_they_were_and_end_with_the_block(machine):
    with gpu_arrays() as gpu:
        check_round_trip(gpu)
        sent = np.arange(6, dtype=np.float32).reshape(2, 3)
        copy, result = gpu.upload(sent), gpu.result((2, 3), "float32")
        array_at(result.address, result.shape, result.dtype)[:] = array_at(
            copy.address, copy.shape, copy.dtype
        )
        (found,) = gpu.download(result)
        assert np.array_equal(found, sent)
        array_at(result.address, result.shape, result.dtype)[:] = 0
        assert np.array_equal(found, sent), "what was downloaded is a copy"
    assert machine.alive["device"] == machine.alive["event"] == 0
    assert not machine.contexts
    before, *_ = (at for at, (name, _) in enumerate(machine.calls) if name == "free device")
    assert ("synchronize", None) in machine.calls[:before], "freed while the GPU may use it"


def test_all_of_a_process_share_one_stream_and_what_they_are_staged_in(machine):
    handles = set()
    for size in (100, 1 << 20, 5):
        with gpu_arrays() as gpu:
            gpu.upload(np.zeros(size, np.uint8))
            handles.add(gpu.stream.handle)
    assert handles == {stream for _, stream in machine.named("copy")}
    assert len(handles) == 1
    assert machine.named("cuMemHostAlloc") == [(1 << 20, "portable")]
    with gpu_arrays() as gpu:
        gpu.upload(np.zeros((1 << 20) + 1, np.uint8))
    assert machine.named("cuMemHostAlloc")[1:] == [(1 << 21, "portable")]


def test_threads_measure_side_by_side(machine):
    def measured(value):
        with gpu_arrays() as gpu:
            copies = [gpu.upload(np.full(1000, value + at)) for at in range(20)]
            found = [array_at(each.address, each.shape, each.dtype) for each in copies]
            return all((array == value + at).all() for at, array in enumerate(found))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(measured, range(0, 800, 100)))


def test_a_full_gpu_says_so_and_frees_what_there_was(machine):
    machine.free_bytes = 1 << 20
    with gpu_arrays() as gpu:
        gpu.upload(np.zeros(10, np.int8))
        with pytest.raises(EngineError, match=r"no 4000000 bytes of device memory"):
            gpu.upload(np.zeros(1_000_000, np.float32))
    assert machine.alive["device"] == 0


@pytest.mark.gpu
def test_a_real_gpu_takes_arrays_and_gives_results():
    pytest.importorskip("cuda.core")
    for _ in range(2):
        with gpu_arrays() as gpu:
            check_round_trip(gpu)
