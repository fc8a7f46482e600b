"""Host arrays on a GPU, and results back: for measuring engines. Serving goes through slots.

Engines keep contexts for every stream they see, so all measuring in a process uses one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from threading import Lock
from typing import Any, cast

import numpy as np

from ...arrays import Array, DeviceArray
from . import open_gpu
from .contract import Device, DeviceBuffer, PinnedBuffer, Stream
from .facts import current_index

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
