"""Host arrays on a GPU and results back, for measuring engines; and how fast copies are.

Serving goes through slots. Engines keep contexts for every stream they see, so all measuring in a
process uses one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from threading import Lock
from time import perf_counter
from typing import Any, cast

import numpy as np

from ...arrays import Array, DeviceArray
from ...errors import EngineError
from . import open_gpu
from .contract import Device, DeviceBuffer, PinnedBuffer, Stream
from .facts import current_index

COPY_BYTES = 1024 * 49_152  # a full batch of 1,024 records of 64 x 384 float16
NUM_COPIES = 5
_BLOCKING_SHARE = 0.5
_BYTES = np.dtype(np.uint8)
_LEAST_BYTES = 1 << 20


class Measuring:
    """A device with the stream of all measuring; lives as long as the process.

    Attributes:
        stream: not the default stream, and no default stream waits for it.
    """

    def __init__(self) -> None:
        self.device: Device = open_gpu("cuda_core", current_index())
        with self.device.current():
            self.stream: Stream = self.device.stream()
        self.staging_lock = Lock()
        self._staging: dict[int, PinnedBuffer] = {}

    def staging(self, num_bytes: int) -> PinnedBuffer:
        """Return pinned memory of at least so many bytes, made once for every power of two.

        It is the caller's while he holds `staging_lock`.
        """
        size = max(_LEAST_BYTES, 1 << max(num_bytes - 1, 0).bit_length())
        if size not in self._staging:
            self._staging[size] = self.device.pinned(size, _BYTES)
        return self._staging[size]


@cache
def measuring() -> Measuring:
    """Return what all measuring of this process goes through, on the GPU of its first call.

    Raises:
        EngineError: no driver, no GPU, or the library is not installed.
    """
    return Measuring()


@contextmanager
def gpu_arrays() -> Iterator[GpuArrays]:
    """Yield arrays on the GPU, which is this thread's own in the block; its end frees them.

    The end waits for everything that the GPU has to do, callbacks included.

    Raises:
        EngineError: as `measuring`.
    """
    shared = measuring()
    with closing(shared.device.sibling()) as device, device.current():
        yield GpuArrays(shared, device)


class GpuArrays:
    """Arrays on the GPU, in the order of the stream of all measuring; one thread at a time."""

    def __init__(self, shared: Measuring, device: Device):
        self.stream = shared.stream
        self._shared, self._device, self._passed = shared, device, device.event()
        self._results: dict[DeviceArray, tuple[PinnedBuffer, DeviceBuffer]] = {}

    def upload(self, source: Array) -> DeviceArray:
        """Return a copy of a C-contiguous host array, which the GPU has when this returns.

        Raises:
            EngineError: the GPU's memory is full.
        """
        target = self._device.memory(max(source.nbytes, 1), _BYTES)
        with self._shared.staging_lock:
            staging = self._shared.staging(source.nbytes)
            staging.view((source.nbytes,))[:] = source.reshape(-1).view(np.uint8)
            self.stream.upload(target, staging, source.nbytes)
            self.synchronize()
        return _array(target, source.shape, source.dtype)

    def result(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """Return new memory for `download`; its values are undefined.

        Raises:
            EngineError: the GPU's memory is full.
        """
        kind = np.dtype(dtype)
        pinned = self._device.pinned(int(np.prod(shape)), kind)
        target = self._device.mirror(pinned)
        array = _array(target, shape, kind)
        self._results[array] = pinned, target
        return array

    def download(self, *results: DeviceArray) -> list[Array]:
        """Return host copies of what `result` gave, once the stream's work until now has run."""
        for array in results:
            pinned, target = self._results[array]
            self.stream.download(pinned, target, int(np.prod(array.shape)))
        self.synchronize()
        return [self._results[array][0].view(array.shape).copy() for array in results]

    def synchronize(self) -> None:
        """Block until the stream's work until now has run."""
        self.stream.record(self._passed)
        self._passed.synchronize()


def _array(buffer: DeviceBuffer, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
    whole = cast(DeviceArray, buffer.view((0,)))
    return DeviceArray(whole.address, shape, dtype)


@dataclass(frozen=True, slots=True)
class CopySpeed:
    """Copies from a device's pinned host memory to the device.

    A copy that blocks its caller overlaps with nothing: the pipeline then reaches half of the
    engine's speed. Memory that only looks pinned (a pool's on some drivers) shows it here.

    Attributes:
        num_bytes: of one copy.
        gb_per_s: 1e9 bytes a second, the best of a few copies.
        call_us: least time that the call took of its thread.
    """

    num_bytes: int
    gb_per_s: float
    call_us: float

    @property
    def blocks(self) -> bool:
        """Whether the call waits for the copy, as it does with pageable memory."""
        return self.call_us >= _BLOCKING_SHARE * self.num_bytes / self.gb_per_s / 1e3

    def describe(self) -> str:
        """Return the figures in one line, with a warning where copies block."""
        text = f"{self.gb_per_s:.1f} GB/s from pinned memory, {self.call_us:.0f} us a call"
        if not self.blocks:
            return text
        return f"{text}: the call waits for the copy, as with pageable memory"


def measure_copies(device: Device, num_bytes: int = COPY_BYTES) -> CopySpeed:
    """Copy random bytes to a device that has memory of its own; return the best of a few.

    Its memory is the device's until it is closed.

    Raises:
        EngineError: the device shares the host's memory, gives none, or is lost.
    """
    if device.shares_memory:
        raise EngineError(f"{device.name} shares the host's memory: nothing is copied to it")
    with device.current():
        pinned = device.pinned(num_bytes, _BYTES)
        random = np.random.default_rng(0)
        pinned.view((num_bytes,))[:] = random.integers(0, 256, num_bytes, np.uint8)
        mirror, stream = device.mirror(pinned), device.stream()
        began, ended = device.event(), device.event()
        calls_s, copies_ms = [], []
        for _ in range(1 + NUM_COPIES):
            stream.record(began)
            called = perf_counter()
            stream.upload(mirror, pinned, num_bytes)
            calls_s.append(perf_counter() - called)
            stream.record(ended)
            ended.synchronize()
            copies_ms.append(ended.elapsed_ms(began))
    return CopySpeed(num_bytes, num_bytes / min(copies_ms[1:]) / 1e6, min(calls_s[1:]) * 1e6)
