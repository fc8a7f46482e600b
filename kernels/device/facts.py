"""What GPU is here: asked of NVIDIA's driver, before anything is opened on it."""

from __future__ import annotations

import ctypes
import importlib
from dataclasses import dataclass
from typing import Any

from ...errors import EngineError

DRIVER = "libcuda.so.1"
BINDINGS = "cuda.bindings.driver"
INSTALL = "pip install cuda-bindings"
_SUCCESS = 0  # CUresult
_NAME_BYTES = 256


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
        if int(call(_initialized(), "cuDeviceGetCount")) < 1:
            return "the NVIDIA driver sees no GPU"
    except EngineError as error:
        return error.message if error.hint is None else f"{error.message} ({error.hint})"
    return None


def driver_library() -> ctypes.CDLL:
    """Return NVIDIA's driver, for what its bindings do not do.

    Raises:
        OSError: it is not here.
    """
    return ctypes.CDLL(DRIVER)


def driver_fault() -> str | None:
    """Return why no CUDA library can work here, None where NVIDIA's driver is."""
    try:
        driver_library()
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


def current_index() -> int:
    """Return the number of the GPU that this thread's work goes to; 0 where none was chosen.

    Raises:
        EngineError: there is no GPU, or it cannot be asked.
    """
    error, *found = _initialized().cuCtxGetDevice()
    return int(found[0]) if int(error) == _SUCCESS else 0


def current_gpu() -> Gpu:
    """Return the GPU that this thread's work goes to.

    Raises:
        EngineError: there is none, or it cannot be asked.
    """
    driver = _initialized()
    device = call(driver, "cuDeviceGet", current_index())
    ask = driver.CUdevice_attribute
    asked = (
        ask.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        ask.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    )
    major, minor = (int(call(driver, "cuDeviceGetAttribute", each, device)) for each in asked)
    name: bytes = call(driver, "cuDeviceGetName", _NAME_BYTES, device)
    version = int(call(driver, "cuDriverGetVersion"))  # 13000 is 13.0
    return Gpu(
        name=name.partition(b"\0")[0].decode(),
        capability=f"{major}.{minor}",
        cuda_version=f"{version // 1000}.{version % 1000 // 10}",
    )


def call(driver: Any, name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA driver; return its (first) result.

    Raises:
        EngineError: the driver's error, in one sentence.
    """
    error, *results = getattr(driver, name)(*arguments)
    if int(error) != _SUCCESS:
        raise EngineError(f"CUDA failed in {name}: {reason(driver, error)}")
    return results[0] if results else None


def reason(driver: Any, error: Any) -> str:
    """Return a `CUresult` in words."""
    _, text = driver.cuGetErrorString(error)
    return text.decode() if isinstance(text, bytes) else str(text)


def _initialized() -> Any:
    """Return the driver's bindings, ready to be called."""
    try:
        driver = importlib.import_module(BINDINGS)
    except ImportError as error:
        raise EngineError(f"{BINDINGS} is not installed here", hint=INSTALL) from error
    call(driver, "cuInit", 0)
    return driver
