"""What GPU is here, and just enough of CUDA's runtime to allocate, copy and wait for measuring.

The online path does not go this way: its batches pass through a `Device` and pinned memory.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from ...arrays import Array, DeviceArray
from ...errors import EngineError

RUNTIME = "cuda.bindings.runtime"
DRIVER = "libcuda.so.1"
INSTALL = "pip install cuda-bindings"


@dataclass(frozen=True, slots=True)
class Gpu:
    """The current GPU.

    Attributes:
        name: as `NVIDIA H200`.
        capability: compute capability, as `9.0`.
        cuda_version: the newest CUDA that its driver serves, as `13.0`.
    """

    name: str
    capability: str
    cuda_version: str


def gpu_fault() -> str | None:
    """Return why nothing can run on a GPU here, None where a GPU, driver and bindings are.

    Driver first: who has none need not install anything else.
    """
    fault = driver_fault()
    if fault is not None:
        return fault
    try:
        cudart = _cudart()
        if int(_call(cudart, "cudaGetDeviceCount")) < 1:
            return "the NVIDIA driver sees no GPU"
    except EngineError as error:
        return error.message if error.hint is None else f"{error.message} ({error.hint})"
    return None


def driver_fault() -> str | None:
    """Return why no CUDA library can work here, None where NVIDIA's driver is."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return f"no NVIDIA driver here ({DRIVER} is missing)"
    return None


def capability_key(capability: str) -> tuple[int, int]:
    """Return a compute capability as numbers to compare: 8.9 comes before 12.0."""
    major, _, minor = capability.partition(".")
    return int(major), int(minor)


def capability_fault(precision: str, least: str) -> str | None:
    """Return why the current GPU cannot run `precision`, None where it can."""
    gpu = current_gpu()
    if capability_key(gpu.capability) >= capability_key(least):
        return None
    return f"{precision} needs compute capability {least} or later, {gpu.name} has {gpu.capability}"


@cache
def current_gpu() -> Gpu:
    """Return the GPU that new work goes to.

    Raises:
        EngineError: there is none, or it cannot be asked.
    """
    cudart = _cudart()
    properties = _call(cudart, "cudaGetDeviceProperties", _call(cudart, "cudaGetDevice"))
    name = properties.name
    driver = int(_call(cudart, "cudaDriverGetVersion"))  # 13000 is 13.0
    return Gpu(
        name=name.decode().rstrip("\0") if isinstance(name, bytes) else str(name),
        capability=f"{properties.major}.{properties.minor}",
        cuda_version=f"{driver // 1000}.{driver % 1000 // 10}",
    )


class CudaStream:
    """A stream of the current GPU, as engines want it; made once, kept by who made it."""

    def __init__(self) -> None:
        self._cudart = _cudart()
        flags = self._cudart.cudaStreamNonBlocking
        self.handle = int(_call(self._cudart, "cudaStreamCreateWithFlags", flags))

    def submit(self, work: Callable[[], None]) -> None:
        """Refuse host work: this stream orders the GPU's only."""
        raise EngineError("a CUDA stream takes no host work")

    def synchronize(self) -> None:
        """Block until the stream is empty."""
        _call(self._cudart, "cudaStreamSynchronize", self.handle)


def allocate(num_bytes: int) -> int:
    """Return the address of new memory on the current GPU, to be given to `free`.

    Raises:
        EngineError: the GPU's memory is full.
    """
    return int(_call(_cudart(), "cudaMalloc", num_bytes))


def free(address: int) -> None:
    """Free what `allocate` returned."""
    _call(_cudart(), "cudaFree", address)


class DeviceMemory:
    """Allocations that live as long as the `with` block; copies in the order of a stream."""

    def __init__(self, stream: CudaStream):
        self._cudart = _cudart()
        self._stream = stream
        self._addresses: list[int] = []

    def __enter__(self) -> DeviceMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.synchronize()
        while self._addresses:
            free(self._addresses.pop())

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """Allocate an array; its values are undefined."""
        array = DeviceArray(0, shape, np.dtype(dtype))
        address = allocate(max(array.nbytes, 1))
        self._addresses.append(address)
        return replace(array, address=address)

    def upload(self, source: Array) -> DeviceArray:
        """Copy a C-contiguous host array, which must live until the stream has passed it."""
        target = self.empty(source.shape, source.dtype.name)
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(target.address, source.ctypes.data, target.nbytes, kind)
        return target

    def download(self, source: DeviceArray) -> Array:
        """Return a host copy; waits for the stream."""
        target = np.empty(source.shape, source.dtype)
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(target.ctypes.data, source.address, source.nbytes, kind)
        self._stream.synchronize()
        return target

    def wait(self) -> None:
        """Block until the copies are through."""
        self._stream.synchronize()

    def _copy(self, target: int, source: int, num_bytes: int, kind: Any) -> None:
        arguments = (target, source, num_bytes, kind, self._stream.handle)
        _call(self._cudart, "cudaMemcpyAsync", *arguments)


def synchronize() -> None:
    """Wait for everything that the current GPU has to do, callbacks included."""
    _call(_cudart(), "cudaDeviceSynchronize")


def copy_row_heads(source: DeviceArray, target: DeviceArray, handle: int) -> None:
    """Copy the first value's worth of bytes of every row of `source` [N, ...] into `target` [N].

    One call, in the order of the stream `handle`: an engine that takes no time, for measuring.
    """
    cudart, width, (num_rows,) = _cudart(), target.dtype.itemsize, target.shape
    pitch = source.nbytes // num_rows
    to_device = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    shape = (target.address, width, source.address, pitch, width, num_rows)
    _call(cudart, "cudaMemcpy2DAsync", *shape, to_device, handle)


@cache
def measuring_stream() -> CudaStream:
    """Return one stream for all measuring: engines keep contexts for every stream they see."""
    return CudaStream()


@cache
def _cudart() -> Any:
    try:
        return importlib.import_module(RUNTIME)
    except ImportError as error:
        raise EngineError(f"{RUNTIME} is not installed here", hint=INSTALL) from error


def _call(cudart: Any, name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime; return its result, raise its error in one sentence."""
    error, *results = getattr(cudart, name)(*arguments)
    if int(error) != 0:
        _, text = cudart.cudaGetErrorString(error)
        reason = text.decode() if isinstance(text, bytes) else str(text)
        raise EngineError(f"CUDA failed in {name}: {reason}")
    return results[0] if results else None
