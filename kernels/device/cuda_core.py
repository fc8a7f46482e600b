"""NVIDIA GPUs through cuda.core: the default. Primary context, so torch and cupy share it."""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ...arrays import Array, DeviceArray
from ...errors import EngineError
from . import contract as protocol
from . import tensor_maps
from .arguments import ArgumentBlock
from .facts import BINDINGS, call, capability_key, gpu_fault, reason
from .gpu import (
    SHARED_UNASKED,
    DeviceMemory,
    Free,
    GpuDevice,
    GpuStream,
    PinnedMemory,
    own,
    stream_handle,
)

CORE = "cuda.core"
LEAST = "1.2"
INSTALL = "pip install 'edje-runtime[gpu]'"
_SUCCESS, _NOT_READY = 0, 600  # CUresult
# Waiting for a whole GPU breaks every capture under way on it, whoever waits.
_CAPTURES = threading.RLock()
ALL_SHARED = 100  # per cent of what shared memory and L1 have together


class CoreEvent:
    """An event that takes the time and lets a waiting thread sleep."""

    def __init__(self, raw: Any):
        self.raw = raw

    def synchronize(self) -> None:
        self.raw.sync()

    def elapsed_ms(self, since: protocol.Event) -> float:
        return float(self.raw - own(since, CoreEvent).raw)


class CoreStream(GpuStream):
    """A stream of cuda.core, our own or borrowed."""

    def __init__(self, raw: Any, driver: Any):
        super().__init__(raw, int(raw.handle))
        self._driver = driver

    def upload(
        self, target: protocol.DeviceBuffer, source: protocol.PinnedBuffer, num_elements: int
    ) -> None:
        self._copy(own(target, DeviceMemory), own(source, PinnedMemory), num_elements)

    def download(
        self, target: protocol.PinnedBuffer, source: protocol.DeviceBuffer, num_elements: int
    ) -> None:
        self._copy(own(target, PinnedMemory), own(source, DeviceMemory), num_elements)

    def record(self, event: protocol.Event) -> None:
        self.raw.record(own(event, CoreEvent).raw)

    def wait(self, event: protocol.Event) -> None:
        self.raw.wait(own(event, CoreEvent).raw)

    def _copy(
        self, target: PinnedMemory | DeviceMemory, source: PinnedMemory | DeviceMemory, count: int
    ) -> None:
        """Copy by the driver's call: cuda.core copies whole buffers only."""
        pinned = target if isinstance(target, PinnedMemory) else source
        num_bytes = count * own(pinned, PinnedMemory).elements.itemsize
        call(self._driver, "cuMemcpyAsync", target.address, source.address, num_bytes, self.handle)


class _CapturingStream(CoreStream):
    """Between the two ends of a capture; events have no place inside a graph."""

    def record(self, event: protocol.Event) -> None:
        raise EngineError("an event cannot be recorded while a graph is captured")

    def wait(self, event: protocol.Event) -> None:
        raise EngineError("an event cannot be waited for while a graph is captured")


class CoreGraph:
    """A CUDA graph."""

    def __init__(self, raw: Any, graphs: set[protocol.Graph]):
        self._raw = raw
        self._graphs = graphs
        graphs.add(self)

    def launch(self, stream: protocol.Stream) -> None:
        self._raw.launch(own(stream, CoreStream).raw)

    def close(self) -> None:
        self._graphs.discard(self)
        self._raw.close()


class CoreKernel:
    """A kernel of a loaded cubin, launched by the driver's call with packed arguments."""

    def __init__(self, driver: Any, function: Any, owner: Any):
        self._driver, self._function = driver, function
        self._owner = owner  # unloads the code when it is forgotten
        self._blocks: dict[tuple[type[np.generic], ...], ArgumentBlock] = {}
        self._lock = threading.Lock()

    def launch(
        self,
        stream: protocol.Stream,
        *,
        grid: protocol.Grid,
        block: protocol.Grid,
        shared_bytes: int,
        arguments: Sequence[np.generic],
    ) -> None:
        handle = own(stream, CoreStream).handle
        types = tuple(map(type, arguments))
        with self._lock:  # the driver copies what is packed before it returns
            packed = self._blocks.get(types)
            if packed is None:
                layout = [argument.dtype for argument in arguments]
                packed = self._blocks[types] = ArgumentBlock(layout)
            packed.write(arguments)
            launch = (*grid, *block, shared_bytes, handle, packed.address, 0)
            call(self._driver, "cuLaunchKernel", self._function, *launch)


class CoreModule:
    """A loaded cubin."""

    def __init__(self, device: CudaCoreDevice, driver: Any, raw: Any):
        self._device, self._driver, self._raw = device, driver, raw

    def kernel(self, symbol: str, shared_bytes: int = 0) -> CoreKernel:
        try:
            owner = self._raw.get_kernel(symbol)
            with self._device.current():
                function = call(self._driver, "cuKernelGetFunction", owner.handle)
                if shared_bytes > SHARED_UNASKED:
                    attributes = self._driver.CUfunction_attribute
                    most = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    call(self._driver, "cuFuncSetAttribute", function, most, shared_bytes)
                    # The rest of the memory is L1: two such blocks shall fit a multiprocessor.
                    share = attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                    call(self._driver, "cuFuncSetAttribute", function, share, ALL_SHARED)
        except Exception as error:
            raise EngineError(f"the module has no kernel {symbol}: {error}") from error
        return CoreKernel(self._driver, function, owner)


class CudaCoreDevice(GpuDevice):
    """One GPU in its primary context. Thread-safe; the opening thread's device is put back."""

    offers_graphs = True

    def __init__(self, index: int = 0):
        """Open GPU `index`, in the order of CUDA_VISIBLE_DEVICES.

        Raises:
            EngineError: no driver, no such GPU, or no cuda.core 1.2 or later.
        """
        super().__init__()
        self._index = index
        self._core, self._driver = _load()
        call(self._driver, "cuInit", 0)
        count = int(call(self._driver, "cuDeviceGetCount"))
        if not 0 <= index < count:
            raise EngineError(f"GPU {index} does not exist here, expected 0 to {count - 1}")
        before = call(self._driver, "cuCtxGetCurrent")
        try:
            self._raw = self._core.Device(index)
            self._raw.set_current()
            self._context = self._raw.context.handle
            self._set_up = self._new_raw_stream()
        finally:
            call(self._driver, "cuCtxSetCurrent", before)
        self.name = str(self._raw.name)
        major, minor = self._raw.compute_capability
        self.compute_capability = int(major), int(minor)
        self.num_processors = int(self._raw.properties.multiprocessor_count)

    def sibling(self) -> CudaCoreDevice:
        return CudaCoreDevice(self._index)

    def borrow(self, stream: object) -> CoreStream:
        handle = stream_handle(stream)
        raw = self._raw.create_stream(_Foreign(stream, handle))
        found = int(raw.device.device_id)
        if found != int(self._raw.device_id):
            raise EngineError(f"the stream is of GPU {found}, expected {self._raw.device_id}")
        return CoreStream(raw, self._driver)

    def capture(
        self, work: Callable[[protocol.Stream], None], stream: protocol.Stream
    ) -> CoreGraph:
        raw = own(stream, CoreStream).raw
        with self.current(), _CAPTURES:
            builder = raw.create_graph_builder()
            try:
                builder.begin_building("relaxed")  # other threads go on copying and allocating
                work(_CapturingStream(raw, self._driver))
                builder.end_building()
                graph = builder.complete()
            except EngineError:
                raise
            except Exception as error:
                raise EngineError(f"this work cannot be captured as a graph: {error}") from error
            finally:
                _end(builder)
                del builder  # or the error's traceback keeps it, to end a later capture
        return CoreGraph(graph, self._graphs)

    def load_module(self, code: bytes) -> CoreModule:
        try:
            with self.current():
                raw = self._core.ObjectCode.from_cubin(code)
                return CoreModule(self, self._driver, raw)
        except Exception as error:
            raise EngineError(f"{self.name} cannot load this cubin: {error}") from error

    def tensor_map(
        self,
        array: DeviceArray,
        block: tuple[int, ...],
        *,
        row_stride: int,
        swizzle: int,
        element: int,
    ) -> np.void:
        """Encode by the driver's call."""
        try:
            return tensor_maps.encode(array, block, row_stride, swizzle, element)
        except ValueError as error:
            said = reason(self._driver, self._driver.CUresult(error.args[0]))
            shown = f"{array.dtype} {list(array.shape)}, rows {row_stride} apart"
            raise EngineError(f"{self.name} takes no tensor map of {shown}: {said}") from error

    def fault(self) -> str | None:
        """Ask for the state of a stream: a broken context gives its error to every call."""
        (error,) = self._driver.cuStreamQuery(self._set_up.handle)
        return None if int(error) in (_SUCCESS, _NOT_READY) else reason(self._driver, error)

    def _push(self) -> None:
        call(self._driver, "cuCtxPushCurrent", self._context)

    def _pop(self) -> None:
        call(self._driver, "cuCtxPopCurrent")

    def _synchronize(self) -> None:
        with _CAPTURES:
            call(self._driver, "cuCtxSynchronize")

    def _release(self) -> None:
        self._set_up.close()

    def _allocate_pinned(self, num_bytes: int) -> tuple[Array, Free]:
        """Allocate by the driver's call, not from cuda.core's pool.

        On an H200 (driver 580.159.04) a copy from pooled host memory blocks its caller at
        7.2 GB/s, as one from pageable memory does; from this memory it returns in 9 us and runs
        at 53.9 GB/s.
        """
        flags = int(self._driver.CU_MEMHOSTALLOC_PORTABLE)
        address = int(call(self._driver, "cuMemHostAlloc", num_bytes, flags))
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        return np.ctypeslib.as_array(memory), lambda: call(self._driver, "cuMemFreeHost", address)

    def _allocate_device(self, num_bytes: int) -> tuple[int, Free]:
        buffer = self._raw.allocate(num_bytes, stream=self._set_up)
        self._set_up.sync()
        return int(buffer.handle), buffer.close

    def _free_bytes(self) -> int:
        return int(call(self._driver, "cuMemGetInfo"))

    def _make_stream(self) -> tuple[CoreStream, Free]:
        raw = self._new_raw_stream()
        return CoreStream(raw, self._driver), raw.close

    def _make_event(self) -> tuple[CoreEvent, Free]:
        options = self._core.EventOptions(timing_enabled=True, blocking_sync=True)
        raw = self._raw.create_event(options)
        return CoreEvent(raw), raw.close

    def _new_raw_stream(self) -> Any:
        return self._raw.create_stream(options=self._core.StreamOptions(nonblocking=True))


class _Foreign:
    """A foreign stream with the protocol that cuda.core takes; keeps its owner alive."""

    def __init__(self, owner: object, handle: int):
        self.owner = owner
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


def _end(builder: Any) -> None:
    """Close a graph builder; the stream then takes work again, whatever went wrong.

    A capture that broke is ended by the first call, which raises that it was broken; the second
    finds none to end and frees the rest.
    """
    for _ in range(2):
        with suppress(Exception):
            builder.close()


def _load() -> tuple[Any, Any]:
    """Import cuda.core and the driver's bindings; driver first: who has none needs no package."""
    fault = gpu_fault()
    if fault is not None:
        raise EngineError(f"the cuda_core device cannot be used: {fault}")
    try:
        core, driver = importlib.import_module(CORE), importlib.import_module(BINDINGS)
    except ImportError as error:
        raise EngineError(f"{CORE} cannot be imported: {error}", hint=INSTALL) from error
    version = str(core.__version__)
    if capability_key(".".join(version.split(".")[:2])) < capability_key(LEAST):
        raise EngineError(f"{CORE} is {version}, expected {LEAST} or later", hint=INSTALL)
    return core, driver
