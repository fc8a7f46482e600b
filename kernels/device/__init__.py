"""Devices by name: which one an engine runs on, opened when it is asked for."""

from __future__ import annotations

from ...errors import EngineError
from .contract import Device
from .host import HostDevice

GPU_DEVICES = ("cuda_core", "pycuda")
NAMES = "host, cuda_core, cuda_core:1, pycuda or pycuda:1 (the number is the GPU's)"


def open_device(name: str | None, kind: object) -> Device:
    """Open the device for an engine; the caller closes it.

    Args:
        name: `host`; `cuda_core` or `pycuda`, with `:1` for another GPU than the first; None:
            what the engine was built for, `host` or `cuda_core`.
        kind: `cuda` or `cpu`, as the engine's manifest says.

    Raises:
        EngineError: no such device, it cannot be used here, or it is not what the engine runs on.
    """
    wanted = name or ("cuda_core" if kind == "cuda" else "host")
    base, _, number = wanted.partition(":")
    is_gpu = base in GPU_DEVICES
    if not (is_gpu and (not number or number.isdecimal())) and wanted != "host":
        raise EngineError(f"no device is called {wanted!r}, expected {NAMES}")
    if is_gpu != (kind == "cuda"):
        raise EngineError(
            f"the engine was built for {'a GPU' if kind == 'cuda' else 'the CPU'}, "
            f"it cannot run on the device {wanted}",
            hint="leave the device out, or build an engine for it: edje build BUNDLE --backend B",
        )
    return open_gpu(base, int(number or 0)) if is_gpu else HostDevice()


def open_gpu(name: str, index: int = 0) -> Device:
    """Open a GPU through the library that `name` (of GPU_DEVICES) means; the caller closes it.

    Raises:
        EngineError: no driver, no such GPU, or the library is not installed.
    """
    if name == "pycuda":
        from .pycuda import PycudaDevice

        return PycudaDevice(index)
    from .cuda_core import CudaCoreDevice

    return CudaCoreDevice(index)
