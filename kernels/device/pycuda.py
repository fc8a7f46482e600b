"""NVIDIA GPUs through pycuda, for services that already live on it. Never `autoinit`.

pycuda ties a context to threads: it must be current wherever something is made, used or freed.
It offers no CUDA graphs; engines that capture graphs themselves (TensorRT-RTX) still do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...arrays import Array, DeviceArray
from ...errors import EngineError
from . import contract as protocol
from .facts import driver_fault
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

DRIVER = "pycuda.driver"
INSTALL = "pip install 'edje-runtime[pycuda]' (it compiles: CUDA headers and a compiler needed)"
NO_TENSOR_MAPS = "the pycuda device passes no tensor maps to kernels; the cuda_core device does"
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


class PycudaEvent:
    """An event that takes the time and lets a waiting thread sleep."""

    def __init__(self, raw: Any):
        self.raw = raw

    def synchronize(self) -> None:
        self.raw.synchronize()

    def elapsed_ms(self, since: protocol.Event) -> float:
        return float(self.raw.time_since(own(since, PycudaEvent).raw))


class PycudaStream(GpuStream):
    """A stream of pycuda, our own or borrowed."""

    def __init__(self, raw: Any, driver: Any):
        super().__init__(raw, int(raw.handle))
        self._driver = driver

    def upload(
        self, target: protocol.DeviceBuffer, source: protocol.PinnedBuffer, num_elements: int
    ) -> None:
        elements = own(source, PinnedMemory).elements[:num_elements]
        self._driver.memcpy_htod_async(own(target, DeviceMemory).address, elements, self.raw)

    def download(
        self, target: protocol.PinnedBuffer, source: protocol.DeviceBuffer, num_elements: int
    ) -> None:
        elements = own(target, PinnedMemory).elements[:num_elements]
        self._driver.memcpy_dtoh_async(elements, own(source, DeviceMemory).address, self.raw)

    def record(self, event: protocol.Event) -> None:
        own(event, PycudaEvent).raw.record(self.raw)

    def wait(self, event: protocol.Event) -> None:
        self.raw.wait_for_event(own(event, PycudaEvent).raw)


class PycudaKernel:
    """A kernel of a loaded cubin."""

    def __init__(self, raw: Any):
        self._raw = raw

    def launch(
        self,
        stream: protocol.Stream,
        *,
        grid: protocol.Grid,
        block: protocol.Grid,
        shared_bytes: int,
        arguments: Sequence[np.generic],
    ) -> None:
        if any(isinstance(argument, np.void) for argument in arguments):
            raise EngineError(NO_TENSOR_MAPS)
        raw = own(stream, PycudaStream).raw
        self._raw(*arguments, grid=grid, block=block, shared=shared_bytes, stream=raw)


class PycudaModule:
    """A loaded cubin."""

    def __init__(self, driver: Any, raw: Any):
        self._driver = driver
        self._raw = raw

    def kernel(self, symbol: str, shared_bytes: int = 0) -> PycudaKernel:
        try:
            function = self._raw.get_function(symbol)
            if shared_bytes > SHARED_UNASKED:
                most = self._driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
                function.set_attribute(most, shared_bytes)
            return PycudaKernel(function)
        except Exception as error:
            raise EngineError(f"the module has no kernel {symbol}: {error}") from error

    def forget(self) -> None:
        """Let pycuda unload it, where its context is current."""
        self._raw = None


class PycudaDevice(GpuDevice):
    """One GPU in its primary context, or in the context that the caller made."""

    offers_graphs = False

    def __init__(self, index: int = 0, *, context: object | None = None):
        """Open GPU `index`, in the order of CUDA_VISIBLE_DEVICES.

        Close it on the thread that opened it: pycuda keeps a primary context that another thread
        releases until the process ends.

        Args:
            context: the caller's own `pycuda.driver.Context`, which stays the caller's; `index`
                then counts for nothing. Engines and streams must be of the same context.

        Raises:
            EngineError: no driver, no such GPU, or no pycuda.
        """
        super().__init__()
        self._driver = _load()
        self._opened_with = (index, context)
        given: Any = context
        self._context = self._retained(index) if given is None else given
        with self.current():
            gpu = self._context.get_device()
            self.name = str(gpu.name())
            major, minor = gpu.compute_capability()
            self.compute_capability = int(major), int(minor)
            self.num_processors = int(gpu.multiprocessor_count)
            self._set_up = self._driver.Stream(_NON_BLOCKING)

    def sibling(self) -> PycudaDevice:
        index, context = self._opened_with
        return PycudaDevice(index, context=context)

    def borrow(self, stream: object) -> PycudaStream:
        if not isinstance(stream, self._driver.Stream):
            stream_handle(stream)
            raise EngineError(
                f"pycuda borrows its own streams only, got {type(stream).__name__}",
                hint="use the cuda_core device, which borrows every stream",
            )
        return PycudaStream(stream, self._driver)

    def capture(
        self, work: Callable[[protocol.Stream], None], stream: protocol.Stream
    ) -> protocol.Graph:
        raise EngineError(
            "pycuda offers no CUDA graphs", hint="use the cuda_core device, which captures them"
        )

    def load_module(self, code: bytes) -> PycudaModule:
        try:
            with self.current():
                module = PycudaModule(self._driver, self._driver.module_from_buffer(code))
        except Exception as error:
            raise EngineError(f"{self.name} cannot load this cubin: {error}") from error
        self._owned.append(module.forget)
        return module

    def tensor_map(
        self,
        array: DeviceArray,
        block: tuple[int, ...],
        *,
        row_stride: int,
        swizzle: int,
        element: int,
    ) -> np.void:
        raise EngineError(NO_TENSOR_MAPS)

    def fault(self) -> str | None:
        """Ask for the state of a stream: a broken context gives its error to every call."""
        try:
            self._set_up.is_done()
        except self._driver.Error as error:
            return str(error)
        return None

    def _retained(self, index: int) -> Any:
        self._driver.init()
        count = int(self._driver.Device.count())
        if not 0 <= index < count:
            raise EngineError(f"GPU {index} does not exist here, expected 0 to {count - 1}")
        return self._driver.Device(index).retain_primary_context()

    def _push(self) -> None:
        self._context.push()

    def _pop(self) -> None:
        self._driver.Context.pop()

    def _synchronize(self) -> None:
        self._driver.Context.synchronize()

    def _release(self) -> None:
        self._set_up = None  # pycuda frees what nobody holds

    def _allocate_pinned(self, num_bytes: int) -> tuple[Array, Free]:
        memory = self._driver.pagelocked_empty(num_bytes, np.uint8)
        return memory, memory.base.free

    def _allocate_device(self, num_bytes: int) -> tuple[int, Free]:
        memory = self._driver.mem_alloc(num_bytes)
        return int(memory), memory.free

    def _free_bytes(self) -> int:
        return int(self._driver.mem_get_info()[0])

    def _make_stream(self) -> tuple[PycudaStream, Free]:
        stream = PycudaStream(self._driver.Stream(_NON_BLOCKING), self._driver)
        return stream, lambda: setattr(stream, "raw", None)

    def _make_event(self) -> tuple[PycudaEvent, Free]:
        event = PycudaEvent(self._driver.Event(self._driver.event_flags.BLOCKING_SYNC))
        return event, lambda: setattr(event, "raw", None)


def _load() -> Any:
    """Import pycuda; driver first: who has none needs no package."""
    fault = driver_fault()
    if fault is not None:
        raise EngineError(f"the pycuda device cannot be used: {fault}")
    try:
        return importlib.import_module(DRIVER)
    except ImportError as error:
        raise EngineError(f"{DRIVER} cannot be imported: {error}", hint=INSTALL) from error
