"""What the GPU devices share: memory as arrays, what they count, own and refuse.

`cuda_core` and `pycuda` add the calls of their library.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from ...arrays import Array, DeviceArray
from ...errors import EngineError
from . import contract as protocol

Free = Callable[[], object]
SHARED_UNASKED = 48 << 10  # bytes of a block's dynamic memory that need no permission


@dataclass(frozen=True, slots=True)
class PinnedMemory:
    """Pinned host memory; the arrays it gives are invalid once its device is closed."""

    elements: Array

    @property
    def address(self) -> int:
        """Address of the first element."""
        return int(self.elements.ctypes.data)

    def view(self, shape: tuple[int, ...]) -> Array:
        return self.elements[: math.prod(shape)].reshape(shape)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Device memory; the arrays it gives are invalid once its device is closed."""

    array: DeviceArray

    @property
    def address(self) -> int:
        """Address of the first element, in the device's address space."""
        return self.array.address

    def view(self, shape: tuple[int, ...]) -> Array:
        return cast(Array, replace(self.array, shape=shape))


class GpuStream:
    """The part of a stream that needs no library; `raw` is the library's own."""

    def __init__(self, raw: Any, handle: int):
        self.raw = raw
        self.handle = handle

    def submit(self, work: Callable[[], None]) -> None:
        raise EngineError("a GPU's stream takes no host work: it orders the GPU's only")


class GpuDevice(ABC):
    """Owns what is made on one GPU in its primary context (or the caller's), and counts it.

    Attributes:
        name: as the driver says it.
        compute_capability: major and minor.
        num_processors: its multiprocessors.
    """

    name: str
    compute_capability: tuple[int, int]
    num_processors: int
    shares_memory = False
    offers_graphs: bool

    def __init__(self) -> None:
        self._process = os.getpid()
        self._owned: list[Free] = []
        self._graphs: set[protocol.Graph] = set()  # made and freed while requests run
        self._usage = protocol.DeviceUsage()
        self._closed = False

    @contextmanager
    def current(self) -> Iterator[None]:
        self._push()
        try:
            yield
        finally:
            self._pop()

    def pinned(self, num_elements: int, dtype: np.dtype[Any]) -> PinnedMemory:
        num_bytes = max(num_elements * dtype.itemsize, 1)
        memory, free = self._allocated("pinned", num_bytes, self._allocate_pinned)
        self._take(free, "pinned_bytes", num_bytes)
        return PinnedMemory(memory[: num_elements * dtype.itemsize].view(dtype))

    def mirror(self, pinned: protocol.PinnedBuffer) -> DeviceMemory:
        elements = own(pinned, PinnedMemory).elements
        return self.memory(elements.size, elements.dtype)

    def memory(self, num_elements: int, dtype: np.dtype[Any]) -> DeviceMemory:
        num_bytes = max(num_elements * dtype.itemsize, 1)
        address, free = self._allocated("device", num_bytes, self._allocate_device)
        self._take(free, "device_bytes", num_bytes)
        return DeviceMemory(DeviceArray(address, (num_elements,), dtype))

    def free_bytes(self) -> int:
        with self.current():
            return self._free_bytes()

    def stream(self) -> protocol.Stream:
        stream, free = self._make_stream()
        self._take(free, "num_streams", 1)
        return stream

    def event(self) -> protocol.Event:
        event, free = self._make_event()
        self._take(free, "num_events", 1)
        return event

    def _take(self, free: Free, counter: str, more: int) -> None:
        """Own what `free` frees, and count it."""
        self._owned.append(free)
        self._usage = replace(self._usage, **{counter: getattr(self._usage, counter) + more})

    def usage(self) -> protocol.DeviceUsage:
        return replace(self._usage, num_graphs=len(self._graphs))

    def close(self) -> None:
        """Wait for the GPU and free everything, the last made first; errors end nothing.

        In a forked child it does nothing: the context is the parent's.
        """
        if os.getpid() != self._process or self._closed:
            return
        self._closed = True
        self._usage = protocol.DeviceUsage()
        with suppress(Exception), self.current():  # a lost device cannot even be entered
            with suppress(Exception):
                self._synchronize()
            for graph in tuple(self._graphs):
                with suppress(Exception):
                    graph.close()
            while self._owned:
                with suppress(Exception):
                    self._owned.pop()()
            self._release()
        self._owned.clear()
        self._graphs.clear()

    def _allocated(
        self, kind: str, num_bytes: int, allocate: Callable[[int], tuple[Any, Free]]
    ) -> tuple[Any, Free]:
        try:
            return allocate(num_bytes)
        except Exception as error:
            raise EngineError(
                f"{self.name} gave no {num_bytes} bytes of {kind} memory: {error}",
                hint="build the engine with a smaller --max-pairs, keep fewer tokens resident, or "
                "free memory",
            ) from error

    @abstractmethod
    def _push(self) -> None: ...

    @abstractmethod
    def _pop(self) -> None: ...

    @abstractmethod
    def _synchronize(self) -> None: ...

    @abstractmethod
    def _release(self) -> None:
        """Free the device's own stream, the last of all."""

    @abstractmethod
    def _allocate_pinned(self, num_bytes: int) -> tuple[Array, Free]:
        """Return uint8 [num_bytes] and what frees it."""

    @abstractmethod
    def _allocate_device(self, num_bytes: int) -> tuple[int, Free]:
        """Return the address and what frees it."""

    @abstractmethod
    def _free_bytes(self) -> int:
        """Return the free bytes of the GPU's memory."""

    @abstractmethod
    def _make_stream(self) -> tuple[protocol.Stream, Free]: ...

    @abstractmethod
    def _make_event(self) -> tuple[protocol.Event, Free]: ...


def own(thing: object, kind: type[Any]) -> Any:
    """Return `thing` if it is of this device's `kind`.

    Raises:
        EngineError: it belongs to another kind of device.
    """
    if not isinstance(thing, kind):
        raise EngineError(f"expected a {kind.__name__}, got {type(thing).__name__}")
    return thing


def stream_handle(stream: object) -> int:
    """Return the `cudaStream_t` of a foreign stream object.

    Raises:
        EngineError: it has neither `__cuda_stream__` nor an integer `handle`.
    """
    ask = getattr(stream, "__cuda_stream__", None)
    if ask is not None:
        return int((ask() if callable(ask) else ask)[1])
    handle = getattr(stream, "handle", None)
    if isinstance(handle, int):
        return handle
    raise EngineError(
        f"{type(stream).__name__} is no CUDA stream",
        hint="hand in an object with __cuda_stream__ (torch, cupy, cuda.core) or a pycuda stream",
    )
