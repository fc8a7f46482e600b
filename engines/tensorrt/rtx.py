"""The `tensorrt-rtx` backend: RTX GPUs. Builds with no GPU and no driver at all.

Kernels are compiled on the user's GPU; a plan serves every compute capability it was built for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...kernels.device.facts import Gpu, capability_fault, capability_key, current_gpu, gpu_fault
from ..build_options import BuildOptions
from ..contract import BuildJob, Engine, OpenOptions
from ..manifest import EngineManifest
from .build import build_plan
from .library import load_trt
from .run import RUNTIME_CACHE, open_plan, read_settings

COMPUTE_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float16"}
# Of a GPU, by precision. 7.5 is a target of the library but has no float32 products in it, which
# the pooler needs (1.7.1: "FP32 GEMM is not supported").
LEAST_CAPABILITY = {"fp32": "8.0", "bf16": "8.0", "fp16": "8.0", "fp8": "8.9"}
DATA_CENTRE = "data-centre GPUs (9.0, 10.0) run the tensorrt backend"
NO_INT8 = "TensorRT-RTX has no int8 activations; build fp8 (8.9 and later) or fp16"

LIBRARY = load_trt("tensorrt-rtx")


def version() -> str:
    """Return TensorRT-RTX's full version."""
    return LIBRARY.version


def why_not(precision: str) -> str | None:
    """Return why this machine cannot run `precision`: it needs a driver and an RTX GPU."""
    if precision not in COMPUTE_TYPES:
        return NO_INT8
    return (
        gpu_fault()
        or unserved_fault(current_gpu())
        or capability_fault(precision, LEAST_CAPABILITY[precision])
    )


def unserved_fault(gpu: Gpu) -> str | None:
    """Return why `gpu` runs no engine of this library in any precision, None where it does.

    Seen on an H200 (9.0) with 1.7.1: it builds for "every GPU", and opens with UNSUPPORTED_CC.
    """
    if gpu.capability in known_capabilities():
        return None
    return (
        f"TensorRT-RTX does not serve compute capability {gpu.capability} ({gpu.name}), only "
        f"{', '.join(known_capabilities())}; {DATA_CENTRE}"
    )


def why_not_build(precision: str, options: BuildOptions) -> str | None:
    """Return why no engine can be built so; the machine needs no GPU.

    On a machine with a GPU that the library does not serve, the GPUs must be named.
    """
    if precision not in COMPUTE_TYPES:
        return NO_INT8
    faults = []
    if not options.compute_capabilities and gpu_fault() is None:
        unserved = unserved_fault(current_gpu())
        if unserved is not None:
            faults.append(f"{unserved}; for another GPU name it, as in --compute-capability 8.9")
    if options.hardware_compatible:
        faults.append(
            "no hardware_compatible: its engines run on every GPU that compute_capabilities names"
        )
    if options.version_compatible:
        faults.append("no version_compatible: its engines open with the version that built them")
    faults += capability_faults(precision, options.compute_capabilities)
    return "; ".join(faults) or None


def known_capabilities() -> tuple[str, ...]:
    """Return the compute capabilities that this version can be told to build for."""
    names = (name for name in LIBRARY.module.ComputeCapability.__members__ if name[2:].isdigit())
    return tuple(f"{name[2:-1]}.{name[-1]}" for name in names)


def capability_faults(precision: str, capabilities: Sequence[str]) -> list[str]:
    """Return one sentence for every capability that the library, or the precision, lacks."""
    known, least = known_capabilities(), LEAST_CAPABILITY[precision]
    unknown = [capability for capability in capabilities if capability not in known]
    early = [
        capability
        for capability in capabilities
        if capability in known and capability_key(capability) < capability_key(least)
    ]
    faults = []
    if unknown:
        served = [one for one in known if capability_key(one) >= capability_key(least)]
        faults.append(
            f"compute capability {', '.join(unknown)} is none of its own ({', '.join(served)}); "
            f"{DATA_CENTRE}"
        )
    if early:
        faults.append(f"{precision} needs compute capability {least}, got {', '.join(early)}")
    return faults


def compute_type(precision: str) -> str:
    """Return the type of what is not quantised: float16 but for fp32 and bf16."""
    return COMPUTE_TYPES[precision]


def device(precision: str, options: BuildOptions) -> dict[str, Any]:
    """Return the GPUs that an engine runs on as the manifest's `device` entry.

    `compute_capabilities` is empty where none was named: then every one from
    `least_compute_capability` on that the library serves.
    """
    named = sorted(options.compute_capabilities, key=capability_key)
    return {
        "kind": "cuda",
        "compute_capabilities": named,
        "least_compute_capability": named[0] if named else LEAST_CAPABILITY[precision],
    }


def device_faults(manifest: EngineManifest) -> list[str]:
    """Compare the GPU here, if there is one, with those that the engine was built for."""
    if gpu_fault() is not None:
        return []  # `why_not` says so
    gpu, built = current_gpu(), manifest.device
    named, least = built.get("compute_capabilities", []), built["least_compute_capability"]
    unserved = unserved_fault(gpu)
    if unserved is not None:
        return [f"device: {unserved}"]
    if gpu.capability in named:
        return []
    if not named and capability_key(gpu.capability) >= capability_key(least):
        return []
    return [
        f"device: built for compute capability {', '.join(named) or f'{least} and later'}, "
        f"{gpu.name} has {gpu.capability}"
    ]


def build(job: BuildJob) -> Mapping[str, Any]:
    """Build the plan. No timing cache: asking for one makes the library look for a GPU."""
    return build_plan(LIBRARY, job)


def load(folder: Path, manifest: EngineManifest, options: OpenOptions) -> Engine:
    """Open the plan; kernels compiled here are kept in the folder, one file a kind of GPU."""
    capability = current_gpu().capability
    kernels = folder / f"{RUNTIME_CACHE}.{capability}.bin"
    settings = read_settings(LIBRARY, options, kernels)
    return open_plan(LIBRARY, folder, manifest, settings)
