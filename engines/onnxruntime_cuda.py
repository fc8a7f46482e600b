"""The `onnxruntime-cuda` backend: ONNX Runtime's CUDA provider, on GPUs that nothing faster serves.

Building only prepares the graph: no GPU is needed, and the one ONNX Runtime installed may be the
one without CUDA. `engines/onnxruntime_cuda_run.py` is the engine.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ..bundle import JOINT_ENCODER
from ..errors import EngineError
from ..kernels.device.facts import (
    capability_fault,
    capability_key,
    current_gpu,
    current_index,
    gpu_fault,
)
from .build_options import BuildOptions
from .contract import BuildJob, Engine, OpenOptions
from .cpu import option_fault
from .manifest import QUANTIZED, EngineManifest
from .onnxruntime_cuda_run import PROVIDER, OrtCudaEngine

MODEL = JOINT_ENCODER
COMPUTE_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LEAST_CAPABILITY = {"fp32": "7.5", "bf16": "8.0", "fp16": "7.5"}
# Source: ONNX Runtime's docs/OperatorKernels.md and qdq_selector_action_transformer.cc: its CUDA
# kernels quantise and dequantise int8 and float8, but only the CPU fuses that with a product.
NO_8_BITS = (
    "ONNX Runtime's CUDA provider has no 8-bit products for such a graph: it would turn every "
    "value back and multiply in float16, slower than fp16; build fp16 or bf16"
)
IN_PLACE = (
    "pip uninstall onnxruntime onnxruntime-gpu, then pip install "
    "'edje-runtime[gpu-onnxruntime]' (both come as the package onnxruntime, so one environment "
    "holds either the extra cpu or this one)"
)
CUDA_LIBRARIES = ("libcudart", "libcublas", "libcublasLt")
ASSIGNMENTS = "get_provider_graph_assignment_info"
STRATEGIES = ("kNextPowerOfTwo", "kSameAsRequested")
_LIMIT, _STRATEGY = "gpu_mem_limit", "arena_extend_strategy"


def version() -> str:
    """Return ONNX Runtime's version."""
    return str(ort.__version__)


def why_not(precision: str) -> str | None:
    """Return why this machine cannot run `precision`; driver and GPU are looked for first."""
    if precision in QUANTIZED:
        return NO_8_BITS
    least = LEAST_CAPABILITY[precision]
    return gpu_fault() or capability_fault(precision, least) or provider_fault()


def why_not_build(precision: str, options: BuildOptions) -> str | None:
    """Return why no engine can be built so; the machine needs neither GPU nor CUDA provider."""
    return NO_8_BITS if precision in QUANTIZED else option_fault(options)


def compute_type(precision: str) -> str:
    """Return the type of the graph's layers."""
    return COMPUTE_TYPES.get(precision, "float16")


def provider_fault() -> str | None:
    """Return why ONNX Runtime cannot use the GPU of this machine, None where it can."""
    preload()
    if PROVIDER not in ort.get_available_providers():
        return f"onnxruntime {version()} here has no {PROVIDER}: {IN_PLACE}"
    if not hasattr(ort.InferenceSession, ASSIGNMENTS):
        return (
            f"onnxruntime {version()} cannot say which nodes it leaves to the CPU; "
            "onnxruntime-gpu 1.26 or later can"
        )
    missing = [name for name in _needed_libraries() if not _loads(name)]
    if missing:
        return (
            f"onnxruntime {version()} needs {', '.join(missing)}, missing here: "
            "pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    return None


@cache
def preload() -> None:
    """Load CUDA and cuDNN from NVIDIA's Python packages, where these are.

    What the library prints of those that are not there is left out: `provider_fault` says it.
    """
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(StringIO()):
            ort.preload_dlls()


def _needed_libraries() -> list[str]:
    major = str(getattr(ort, "cuda_version", "")).partition(".")[0]
    return [f"{name}.so.{major}" for name in CUDA_LIBRARIES] if major else []


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def device(precision: str, options: BuildOptions) -> dict[str, Any]:
    """Return the GPUs that an engine runs on as the manifest's `device` entry."""
    return {"kind": "cuda", "least_compute_capability": LEAST_CAPABILITY[precision]}


def device_faults(manifest: EngineManifest) -> list[str]:
    """Compare the GPU here, if there is one, with those that the engine was built for."""
    if gpu_fault() is not None:
        return []  # `why_not` says so
    gpu, least = current_gpu(), manifest.device["least_compute_capability"]
    if capability_key(gpu.capability) >= capability_key(least):
        return []
    return [
        f"device: built for compute capability {least} and later, {gpu.name} has {gpu.capability}"
    ]


def build(job: BuildJob) -> Mapping[str, Any]:
    """Copy the graph: ONNX Runtime fuses it at opening, for the GPU that it then finds."""
    shutil.copyfile(job.graph, job.out / MODEL)
    return {"graph_optimization_level": "all, at opening"}


def load(folder: Path, manifest: EngineManifest, options: OpenOptions) -> Engine:
    """Open the graph for the current GPU; its sessions come with the streams."""
    settings = read_settings(options, least_bytes=(folder / MODEL).stat().st_size)
    return OrtCudaEngine(manifest, folder / MODEL, settings, current_index())


def read_settings(options: OpenOptions, *, least_bytes: int) -> dict[str, str]:
    """Check the settings of an opening; return the CUDA provider's options.

    `backend_settings`: `gpu_mem_limit` (most bytes of GPU memory that the arena of one session
    takes, weights included; a session is made for every stream) and `arena_extend_strategy`
    (kNextPowerOfTwo, ONNX Runtime's default, or kSameAsRequested: slower to grow, wastes less).

    Args:
        least_bytes: what the weights alone take.

    Raises:
        EngineError: other settings or values, or CPU threads (all named).
    """
    given = {name: str(value) for name, value in options.backend_settings.items()}
    faults = [f"{name}: unknown setting" for name in given if name not in (_LIMIT, _STRATEGY)]
    limit, strategy = given.get(_LIMIT), given.get(_STRATEGY)
    if limit is not None and not (limit.isascii() and limit.isdigit()):
        faults.append(f"{_LIMIT}: got {limit!r}, expected bytes, as 4000000000")
    elif limit is not None and int(limit) < least_bytes:
        faults.append(f"{_LIMIT}: got {limit}, the weights alone take {least_bytes} bytes")
    if strategy is not None and strategy not in STRATEGIES:
        faults.append(f"{_STRATEGY}: got {strategy!r}, expected {' or '.join(STRATEGIES)}")
    if options.num_threads is not None:
        faults.append(f"num_threads: got {options.num_threads}, a GPU engine has no CPU threads")
    if faults:
        raise EngineError("onnxruntime-cuda cannot be opened so", faults=faults)
    return given
