"""Both GPU devices with stand-ins for their libraries; with the real ones where a GPU is."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from copying_engine import CopyingEngine
from edje.arrays import DeviceArray
from edje.errors import EngineError
from edje.kernels.device import facts
from edje.kernels.device.contract import DeviceUsage
from edje.kernels.device.cuda_core import CudaCoreDevice
from edje.kernels.device.pycuda import PycudaDevice
from edje.kernels.launch import KernelLibrary
from edje.runtime.pipeline import Pipeline, Request
from edje.runtime.text import TokenizedQueries
from on_addresses import OnAddresses
from pretended_gpu import (
    CUBIN,
    FOREIGN,
    GPU_NAME,
    Machine,
    make_core,
    make_driver,
    pretend_gpu,
)
from toy_engine import ToySource, toy_manifest

DEVICES = {"cuda_core": CudaCoreDevice, "pycuda": PycudaDevice}


@pytest.fixture
def machine(monkeypatch):
    return pretend_gpu(monkeypatch)


@pytest.fixture(params=DEVICES)
def device(request, machine):
    device = DEVICES[request.param]()
    yield device
    machine.broken = None
    device.close()


@pytest.fixture
def core(machine):
    device = CudaCoreDevice()
    yield device
    device.close()


def toy_score(batch):
    """Score as the toy engine does."""
    text = batch.text_ids.sum(1) / 1024
    return batch.visual_tokens[:, 0, 0] + text[batch.query_of_pair]


def gpu_engine():
    return OnAddresses(toy_manifest(), toy_score)


def make_request(rows):
    text_ids = np.full((1, 63), 5, np.int32)
    text_ids[0, 8:] = 0
    queries = TokenizedQueries(text_ids, np.array([8], np.int32), np.zeros(1, np.bool_))
    return Request(queries, np.zeros(len(rows), np.int64), rows)


def test_the_pipeline_runs_on_a_gpu_from_any_thread(device, machine):
    pipeline = Pipeline(gpu_engine(), ToySource(), device)
    made, alive = device.usage(), dict(machine.alive)

    def call(number):
        rows = np.arange(number, number + 30)
        result = pipeline.run(make_request(rows))
        assert np.array_equal(result.scores, (rows + 40 / 1024).astype(np.float32))
        assert result.upload_ms > 0
        assert result.download_ms > 0
        assert not machine.contexts, "a context was left on the thread"
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(40)))
    assert (device.usage(), machine.alive) == (made, alive)
    streams = {stream for _, stream in machine.named("copy")}
    assert len(streams) == 2, "copies in and out share no stream with each other"
    pipeline.close()


def test_copies_move_as_many_elements_as_asked(device):
    with device.current():
        pinned, back = (device.pinned(100, np.dtype(np.int32)) for _ in range(2))
        mirror, stream, event = device.mirror(pinned), device.stream(), device.event()
        pinned.view((100,))[:] = np.arange(100)
        back.view((100,))[:] = -1
        stream.upload(mirror, pinned, 60)
        stream.download(back, mirror, 40)
        stream.record(event)
        event.synchronize()
    assert back.view((4, 10)).tolist() == np.arange(40).reshape(4, 10).tolist()
    assert (back.view((100,))[40:] == -1).all()
    array = mirror.view((5, 4))
    assert isinstance(array, DeviceArray)
    assert (array.shape, array.dtype) == ((5, 4), np.int32)


def test_usage_counts_what_was_made_and_close_frees_all_of_it(device, machine):
    with device.current():
        mirror = device.mirror(device.pinned(10, np.dtype(np.float16)))
        device.stream()
        device.event()
    assert mirror.view((10,)).nbytes == 20
    assert (device.name, device.compute_capability) == (GPU_NAME, (9, 0))
    assert device.usage() == DeviceUsage(20, 20, 1, 1)
    device.close()
    device.close()
    assert device.usage() == DeviceUsage()
    assert not any(machine.alive.values()), machine.alive
    assert not machine.contexts


def test_streams_do_not_block_and_events_take_the_time_and_sleep(device, machine):
    with device.current():
        stream, first, second = device.stream(), device.event(), device.event()
        stream.record(first)
        stream.record(second)
        stream.wait(first)
    assert second.elapsed_ms(first) == 1
    assert first.elapsed_ms(second) == -1
    assert set(map(str, machine.named("stream"))) in ({"namespace(nonblocking=True)"}, {"1"})
    assert set(map(str, machine.named("event"))) in (
        {"namespace(timing_enabled=True, blocking_sync=True)"},
        {"1"},
    )


@pytest.mark.parametrize("kind", DEVICES)
def test_the_threads_own_context_is_put_back(kind, machine):
    machine.contexts.append(FOREIGN)
    device = DEVICES[kind]()
    assert machine.contexts == [FOREIGN]
    with device.current(), device.current():
        device.stream()
    assert machine.contexts == [FOREIGN]
    device.close()
    assert machine.contexts == [FOREIGN]
    machine.contexts.clear()


def test_what_is_not_this_devices_is_refused(device):
    with device.current():
        stream, pinned = device.stream(), device.pinned(4, np.dtype(np.int8))
        with pytest.raises(EngineError, match="expected a DeviceMemory, got PinnedMemory"):
            stream.upload(pinned, pinned, 4)
        with pytest.raises(EngineError, match=r"expected a \w+Event, got object"):
            stream.record(object())
        with pytest.raises(EngineError, match="takes no host work"):
            stream.submit(lambda: None)


def test_a_full_gpu_says_how_much_was_asked(device, machine):
    machine.free_bytes = 999
    with device.current():
        with pytest.raises(EngineError, match=rf"{GPU_NAME} gave no 4000 bytes of pinned") as error:
            device.pinned(1000, np.dtype(np.float32))
        small = device.pinned(100, np.dtype(np.float32))
        machine.free_bytes = 9
        with pytest.raises(EngineError, match=r"no 400 bytes of device memory: .*out of memory"):
            device.mirror(small)
    assert "--max-pairs" in error.value.hint


def test_a_lost_gpu_is_noticed_and_refuses_further_work(device, machine):
    def breaks(batch):
        machine.broken = "an illegal memory access"
        return toy_score(batch)

    engine, source = gpu_engine(), ToySource()
    pipeline = Pipeline(engine, source, device)
    assert device.fault() is None
    request = make_request(np.arange(20))
    pipeline.run(request)
    source.fail = {3: RuntimeError("not the GPU's fault")}
    with pytest.raises(EngineError, match="Stage: gather"):
        pipeline.run(request)
    source.fail = {}
    engine.score = breaks
    with pytest.raises(EngineError, match=f"{GPU_NAME} is lost, .*: an illegal memory access"):
        pipeline.run(request)
    engine.score = toy_score
    with pytest.raises(EngineError, match="takes no more work") as error:
        pipeline.run(request)
    assert "restart the process" in error.value.hint
    machine.broken = None  # to be freed


def test_a_forked_child_frees_nothing_of_its_parents(device, machine, monkeypatch):
    pipeline = Pipeline(gpu_engine(), ToySource(), device)
    alive, parent = dict(machine.alive), os.getpid()
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: parent + 1)
        with pytest.raises(EngineError, match=f"opened in process {parent}, .* {parent + 1}"):
            pipeline.run(make_request(np.arange(3)))
        device.close()
    assert machine.alive == alive
    assert len(pipeline.run(make_request(np.arange(3))).scores) == 3


def test_modules_are_loaded_and_their_kernels_launched(device, machine):
    module = device.load_module(CUBIN)
    arguments = [np.uint64(4096), np.int32(7)]
    with device.current():
        module.kernel("gather_tokens").launch(
            device.stream(), grid=(8, 1, 1), block=(128, 1, 1), shared_bytes=64, arguments=arguments
        )
    assert machine.named("launch") == [((8, 1, 1), (128, 1, 1), 64, tuple(arguments))]
    with pytest.raises(EngineError, match="no kernel gather: named symbol not found"):
        module.kernel("gather")
    with pytest.raises(EngineError, match="cannot load this cubin: no kernel image"):
        device.load_module(b"for another GPU")


def test_shared_memory_past_48_kb_is_asked_for_at_set_up(device, machine):
    with device.current():
        stream, arguments = device.stream(), [np.uint64(4096), np.int32(7)]
        how = {"grid": (1, 1, 1), "block": (32, 1, 1), "arguments": arguments}
        module = device.load_module(CUBIN)
        with pytest.raises(Exception, match="invalid argument"):
            module.kernel("gather_tokens", 48 << 10).launch(stream, shared_bytes=49_153, **how)
        assert machine.named("allow shared") == []
        module.kernel("gather_tokens", 99 << 10).launch(stream, shared_bytes=99 << 10, **how)
    assert machine.named("allow shared") == [99 << 10]


MAPPED = {"row_stride": 80 * 384, "swizzle": 3, "element": 6}


def test_a_tensor_map_says_rows_and_columns_from_the_innermost(core):
    array = DeviceArray(0x7000, (256, 384), np.dtype(np.float16))
    encoded = core.tensor_map(array, (128, 64), **MAPPED)
    assert (type(encoded), encoded.nbytes) == (np.void, 128)
    numbers = np.frombuffer(encoded.tobytes(), np.uint64).tolist()
    row_bytes = 80 * 384 * 2
    assert numbers[:8] == [0x7000, 384, 256, row_bytes, 64, 128, 3, 6]
    with pytest.raises(EngineError, match=r"no tensor map of float16 \[256, 384\], rows 30720"):
        core.tensor_map(DeviceArray(0x7001, (256, 384), array.dtype), (128, 64), **MAPPED)


def test_pycuda_passes_no_tensor_maps(machine):
    device = PycudaDevice()
    array = DeviceArray(0x7000, (256, 384), np.dtype(np.float16))
    with pytest.raises(EngineError, match="the pycuda device passes no tensor maps"):
        device.tensor_map(array, (128, 64), **MAPPED)
    with device.current(), pytest.raises(EngineError, match="passes no tensor maps"):
        device.load_module(CUBIN).kernel("gather_tokens").launch(
            device.stream(),
            grid=(1, 1, 1),
            block=(32, 1, 1),
            shared_bytes=0,
            arguments=[np.void(bytes(128))],
        )
    device.close()


def test_a_compiled_kernel_gets_its_maps_among_its_arguments(core, machine):
    with core.current():
        library = KernelLibrary(core, core.compute_capability)
        kernel = library.kernel("product_tma_float16_none_128x64x64")
        rows = DeviceArray(0x7000, (256, 384), np.dtype(np.float16))
        sizes = {"control": 64, "rows_per_pair": 80, "num_out": 384, "num_in": 384}
        kernel.launch(core.stream(), 5, x=(rows, 768), weight=rows, bias=32, out=rows, **sizes)
    ((grid, block, shared_bytes, arguments),) = machine.named("launch")
    assert (grid, block) == ((5, 1, 1), (128, 1, 1))
    assert machine.named("allow shared") == [shared_bytes]
    maps, rest = arguments[:1], [int(each) for each in arguments[1:5]]
    assert (rest, len(arguments)) == ([256, 384, 768, 1], 22)
    assert np.frombuffer(maps[0].tobytes(), np.uint64)[3] == 768 * 2
    assert [int(each) for each in arguments[16:]] == [64, 80, 384, 384, 0, 0]


class Foreign:
    """A stream as torch and cupy hand it in."""

    def __init__(self, gpu=0):
        self.gpu = gpu

    def __cuda_stream__(self):
        return 0, 4711


def test_cuda_core_borrows_any_stream_of_its_gpu(core, machine):
    with core.current():
        assert core.borrow(Foreign()).handle == 4711
        assert core.borrow(SimpleNamespace(handle=17)).handle == 17
        with pytest.raises(EngineError, match="the stream is of GPU 1, expected 0"):
            core.borrow(Foreign(gpu=1))
        with pytest.raises(EngineError, match="str is no CUDA stream"):
            core.borrow("stream")
    assert core.usage() == DeviceUsage()


def test_pycuda_borrows_its_own_streams_only(machine):
    device = PycudaDevice()
    with device.current():
        mine = sys.modules["pycuda.driver"].Stream(0)
        assert device.borrow(mine).handle == mine.handle
        with pytest.raises(EngineError, match="its own streams only, got Foreign"):
            device.borrow(Foreign())
    device.close()


def test_pycuda_works_in_the_callers_context(machine):
    theirs = sys.modules["pycuda.driver"].Context("theirs")
    device = PycudaDevice(context=theirs)
    with device.current():
        assert machine.contexts == ["theirs"]
    assert ("init", None) not in machine.calls
    device.close()


def round_trip(core):
    """Return memory on the host, where it comes back, and the copies between, with a stream."""
    pinned, back = (core.pinned(8, np.dtype(np.int8)) for _ in range(2))
    mirror, stream = core.mirror(pinned), core.stream()
    pinned.view((8,))[:] = 1
    back.view((8,))[:] = 0

    def work(on):
        on.upload(mirror, pinned, 8)
        on.download(back, mirror, 8)

    return pinned.view((8,)), back.view((8,)), work, stream


def test_a_graph_copies_again_at_every_launch_until_it_is_closed(core, machine):
    with core.current():
        pinned, back, work, stream = round_trip(core)
        graph = core.capture(work, stream)
        assert back.tolist() == [0] * 8
        for value in (1, 2):
            pinned[:] = value
            graph.launch(stream)
            assert back.tolist() == [value] * 8
        assert core.usage().num_graphs == machine.alive["graph"] == 1
        graph.close()
        graph.close()
    assert core.usage().num_graphs == machine.alive["graph"] == machine.alive["graph builder"] == 0
    assert machine.named("begin_building") == [("relaxed", stream.handle)]
    assert machine.named("launch graph") == [stream.handle] * 2


def test_a_capture_takes_the_work_of_its_own_stream_only(core, machine):
    """The engine finds the state that it has for the stream; other streams go on."""
    with core.current():
        _, back, work, stream = round_trip(core)
        _, elsewhere, other_work, other = round_trip(core)
        seen = []

        def both(on):
            seen.append(on.handle)
            other_work(other)
            work(on)

        core.capture(both, stream)
    assert seen == [stream.handle]
    assert (elsewhere.tolist(), back.tolist()) == ([1] * 8, [0] * 8)


def test_a_borrowed_stream_can_be_captured(core, machine):
    with core.current():
        _, back, work, _ = round_trip(core)
        core.capture(work, core.borrow(Foreign()))
    assert machine.named("begin_building") == [("relaxed", 4711)]
    assert back.tolist() == [0] * 8


def test_closing_the_device_frees_the_graphs_first(core, machine):
    with core.current():
        _, _, work, stream = round_trip(core)
        core.capture(work, stream)
    core.close()
    freed = [name for name, _ in machine.calls if name in ("close graph", "close stream")]
    assert freed[0] == "close graph"
    assert not any(machine.alive.values()), machine.alive


def test_work_that_is_no_graph_is_refused_and_the_capture_ends(core, machine):
    with core.current():
        event, stream = core.event(), core.stream()
    with pytest.raises(EngineError, match="event cannot be recorded while a graph"):
        core.capture(lambda on: on.record(event), stream)
    with pytest.raises(EngineError, match="event cannot be waited for while a graph"):
        core.capture(lambda on: on.wait(event), stream)
    with pytest.raises(EngineError, match="cannot be captured as a graph: division"):
        core.capture(lambda on: 1 / 0, stream)
    assert machine.capturing is None
    assert machine.alive["graph builder"] == 0
    assert core.usage().num_graphs == 0
    assert not machine.contexts


def test_a_capture_that_breaks_says_so_and_leaves_the_stream_as_it_was(core, machine):
    with core.current():
        _, back, work, stream = round_trip(core)
        machine.breaks_captures = True
        with pytest.raises(EngineError, match=r"cannot be captured as a graph: .*invalidated"):
            core.capture(work, stream)
        assert (machine.capturing, machine.alive["graph builder"]) == (None, 0)
        work(stream)
    assert back.tolist() == [1] * 8


def test_pycuda_says_that_it_has_no_graphs(machine):
    device = PycudaDevice()
    assert not device.offers_graphs
    with device.current(), pytest.raises(EngineError, match="no CUDA graphs") as error:
        device.capture(lambda stream: None, device.stream())
    assert "cuda_core" in error.value.hint
    device.close()


def test_pinned_memory_is_the_drivers_own_in_every_context(core, machine):
    """A pool's copies block their caller, as pageable memory's do."""
    with core.current():
        core.pinned(4, np.dtype(np.int32))
    assert machine.named("cuMemHostAlloc") == [(16, "portable")]


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("index", [-1, 1])
def test_a_gpu_that_does_not_exist_is_named(kind, index, machine):
    with pytest.raises(EngineError, match=f"GPU {index} does not exist here, expected 0 to 0"):
        DEVICES[kind](index)


@pytest.mark.parametrize(
    ("kind", "module"), [("cuda_core", "cuda.core"), ("pycuda", "pycuda.driver")]
)
def test_a_missing_package_is_named_with_what_installs_it(kind, module, machine, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EngineError, match=f"{module} cannot be imported") as error:
        DEVICES[kind]()
    assert "pip install 'edje-runtime[" in error.value.hint


@pytest.mark.parametrize("version", ["0.3.2", "1.1.0"])
def test_an_old_cuda_core_is_refused(version, machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", make_core(machine, version))
    with pytest.raises(EngineError, match=f"cuda.core is {version}, expected 1.2 or later"):
        CudaCoreDevice()


@pytest.mark.parametrize("kind", DEVICES)
def test_a_machine_without_a_driver_says_so(kind, monkeypatch):
    monkeypatch.setattr(facts, "DRIVER", "libno-such-driver.so.1")
    with pytest.raises(EngineError, match=f"the {kind} device cannot be used: no NVIDIA driver"):
        DEVICES[kind]()


def test_the_stand_in_has_no_call_that_the_driver_lacks():
    real = pytest.importorskip("cuda.bindings.driver")
    stand_in = make_driver(Machine())
    names = {name for name in vars(stand_in) if name.lower().startswith("cu")}
    assert len(names) > 15
    assert names <= set(dir(real))
    for kind in ("CUdevice_attribute", "CUmemorytype"):
        assert set(vars(getattr(stand_in, kind))) <= set(dir(getattr(real, kind)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DEVICES)
def test_a_real_gpu_copies_orders_times_and_frees(kind):
    pytest.importorskip({"cuda_core": "cuda.core", "pycuda": "pycuda"}[kind])
    device = DEVICES[kind]()
    expected = np.random.default_rng(7).integers(-99, 99, 1 << 20).astype(np.int32)

    def round_trip(_):
        with device.current():
            pinned, back = (device.pinned(expected.size, np.dtype(np.int32)) for _ in range(2))
            mirror, copy, result = device.mirror(pinned), device.stream(), device.stream()
            started, uploaded, finished = (device.event() for _ in range(3))
            pinned.view(expected.shape)[:] = expected
            copy.record(started)
            copy.upload(mirror, pinned, expected.size)
            copy.record(uploaded)
            result.wait(uploaded)
            result.download(back, mirror, expected.size)
            result.record(finished)
            finished.synchronize()
            assert finished.elapsed_ms(started) > 0
            return np.array_equal(back.view(expected.shape), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(round_trip, range(8)))
    assert device.fault() is None
    assert device.usage().pinned_bytes == 16 * expected.nbytes
    device.close()
    assert device.usage() == DeviceUsage()


@pytest.mark.gpu
def test_a_real_gpu_captures_copies_and_borrows_a_stream():
    pytest.importorskip("cuda.core")
    device = CudaCoreDevice()
    with device.current():
        pinned, back = (device.pinned(64, np.dtype(np.int32)) for _ in range(2))
        mirror, stream, event = device.mirror(pinned), device.stream(), device.event()

        def work(on):
            on.upload(mirror, pinned, 64)
            on.download(back, mirror, 64)

        work(stream)
        graph = device.capture(work, stream)
        borrowed = device.borrow(stream.raw)
        assert borrowed.handle == stream.handle
        for value in (3, 4):
            back.view((64,))[:] = -1
            pinned.view((64,))[:] = value
            graph.launch(borrowed)
            borrowed.record(event)
            event.synchronize()
            assert (back.view((64,)) == value).all()
    device.close()


@pytest.mark.gpu
def test_a_real_gpu_captures_the_work_of_a_lane_while_others_copy():
    pytest.importorskip("cuda.core")
    device = CudaCoreDevice()
    with device.current():
        pinned, back = (device.pinned(1 << 20, np.dtype(np.int32)) for _ in range(2))
        mirror, copy, compute = device.mirror(pinned), device.stream(), device.stream()
        copied, done = device.event(), device.event()

        def work(on):
            on.download(back, mirror, 1 << 20)

        def work_and_others(on):
            copy.upload(mirror, pinned, 1 << 20)  # on another stream: runs, is not captured
            work(on)

        pinned.view((1 << 20,))[:] = 1
        work(compute)
        graph = device.capture(work_and_others, compute)
        with pytest.raises(EngineError, match="captured as a graph: division"):
            device.capture(lambda on: (work(on), 1 / 0), compute)
        for value in (5, 6):
            copied.synchronize()
            done.synchronize()
            pinned.view((1 << 20,))[:] = value
            copy.upload(mirror, pinned, 1 << 20)
            copy.record(copied)
            compute.wait(copied)
            graph.launch(compute)
            compute.record(done)
            done.synchronize()
            assert (back.view((1 << 20,)) == value).all()
        assert device.usage().num_graphs == 1
        graph.close()
        work(compute)
        compute.record(done)
        done.synchronize()
    assert device.usage().num_graphs == 0
    assert device.fault() is None
    device.close()


@pytest.mark.gpu
def test_a_real_gpu_scores_by_graphs_as_without_them():
    """The engine adds nothing but copies: what counts is that every slot gets its own scores."""
    pytest.importorskip("cuda.core")
    device = CudaCoreDevice()
    pipelines = [
        Pipeline(CopyingEngine(toy_manifest()), ToySource(), device, graphs=graphs)
        for graphs in (True, False)
    ]
    for start in range(20):
        rows = np.arange(start, start + 40)
        found = [pipeline.run(make_request(rows)).scores for pipeline in pipelines]
        assert np.array_equal(found[0], found[1])
    reports = [pipeline.graphs for pipeline in pipelines]
    assert (reports[0].captured, reports[1].captured) == (3, 0)
    assert reports[0].launched == 20 * 5 - 6
    device.close()
