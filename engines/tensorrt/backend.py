"""The `tensorrt` backend: TensorRT 10 and 11 on data-centre GPUs. Builds on the GPU it runs on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...kernels.device.facts import Gpu, capability_fault, capability_key, current_gpu, gpu_fault
from ..build_options import BuildOptions
from ..contract import BuildJob, Engine, OpenOptions
from ..manifest import EngineManifest
from .build import build_plan
from .library import load_trt
from .run import open_plan, read_settings

COMPUTE_TYPES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "int8": "float16",
    "fp8": "float16",
}
LEAST_CAPABILITY = {"fp32": "7.5", "bf16": "8.0", "fp16": "7.5", "int8": "7.5", "fp8": "8.9"}
LEAST_PORTABLE = "8.0"  # what AMPERE_PLUS stands for
LEAST_MAJOR = 10  # the first whose networks may be strongly typed with all our types

LIBRARY = load_trt("tensorrt")


def version() -> str:
    """Return TensorRT's full version."""
    return LIBRARY.version


def why_not(precision: str) -> str | None:
    """Return why this machine cannot run `precision`: a driver and a GPU are needed."""
    if int(LIBRARY.version.partition(".")[0]) < LEAST_MAJOR:
        return f"TensorRT {LIBRARY.version} is too old, {LEAST_MAJOR} or later is needed"
    return gpu_fault() or capability_fault(precision, LEAST_CAPABILITY[precision])


def why_not_build(precision: str, options: BuildOptions) -> str | None:
    """Return why this machine cannot build `precision`: kernels are timed on its GPU."""
    if options.compute_capabilities:
        return "no compute_capabilities: it builds for the GPU of this machine"
    return why_not(precision)


def compute_type(precision: str) -> str:
    """Return the type of what is not quantised: float16 but for fp32 and bf16."""
    return COMPUTE_TYPES[precision]


def device(precision: str, options: BuildOptions) -> dict[str, Any]:
    """Return this machine's GPU as the manifest's `device` entry."""
    gpu = current_gpu()
    return {
        "kind": "cuda",
        "name": gpu.name,
        "compute_capability": gpu.capability,
        "cuda_version": gpu.cuda_version,
        "hardware_compatible": options.hardware_compatible,
    }


def device_faults(manifest: EngineManifest) -> list[str]:
    """Compare the GPU here, if there is one, with the one that the engine was built on."""
    if gpu_fault() is not None:
        return []  # `why_not` says so
    gpu, built = current_gpu(), manifest.device
    if built.get("hardware_compatible"):
        if capability_key(gpu.capability) >= capability_key(LEAST_PORTABLE):
            return []
        return [
            f"device: built for compute capability {LEAST_PORTABLE} and later, "
            f"{gpu.name} has {gpu.capability}"
        ]
    found = {"name": gpu.name, "compute_capability": gpu.capability}
    return [
        f"device {name.replace('_', ' ')}: built on {built.get(name)!r}, this is {value!r}"
        for name, value in found.items()
        if built.get(name) != value
    ]


def build(job: BuildJob) -> Mapping[str, Any]:
    """Build the plan, with the kernel timings that this kind of GPU gave before."""
    return build_plan(LIBRARY, job, timing_cache(current_gpu()))


def timing_cache(gpu: Gpu) -> Path:
    """Return the user's file of kernel timings for a GPU and this version of TensorRT."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu.name).strip("-")
    return Path(root) / "edje" / f"timings-{name}-{LIBRARY.version}.bin"


def load(folder: Path, manifest: EngineManifest, options: OpenOptions) -> Engine:
    """Open the plan."""
    return open_plan(LIBRARY, folder, manifest, read_settings(LIBRARY, options, None))
