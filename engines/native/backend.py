"""The `native` backend: NVIDIA GPUs from compute capability 8.0 on, with nothing but the driver."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...bundle import ATTENTION_OUTPUT, ModelSizes
from ...kernels.cuda_manifest import read_cuda_manifest
from ...kernels.device import open_gpu
from ...kernels.device.facts import Gpu, capability_key, current_gpu, current_index, gpu_fault
from ...kernels.launch import runs_on
from ...kernels.layer_variants import POINTER_TILES, product_name, product_tma_name
from ...kernels.layer_variants8 import KINDS
from ...kernels.manifest import read_manifest
from ...kernels.tuning import read_tuning, serving_table, tuned_capabilities
from ..build_options import BuildOptions, given_options
from ..contract import BuildJob, Engine, OpenOptions
from ..manifest import EngineManifest
from ..scales import DYNAMIC, Scales
from .plan import Plan
from .run import NativeEngine, raise_setting_faults
from .weights import read_weights

# Types of what is not quantised.
COMPUTE_TYPES = {"fp16": "float16", "bf16": "bfloat16", "int8": "float16", "fp8": "float16"}
# Kernels add, activate and normalise in float32 before they round what the next one reads.
OPERANDS_ONLY = True
# What loads the compiled kernels: r570 and later.
LEAST_CUDA = "12.8"
NEVER_QUANTIZED = {
    ATTENTION_OUTPUT: "its input is made head by head, and it is a twelfth of the products"
}
NEEDED = ("cuda.core", "safetensors")


def version() -> str:
    """Return the version of the compiled kernels: an engine opens with those it was built for."""
    return f"kernels-{read_manifest().source_hash[:12]}-{read_cuda_manifest().source_hash[:12]}"


def why_not(precision: str) -> str | None:
    """Return why this machine cannot run `precision`, None where it can."""
    if precision not in COMPUTE_TYPES:
        return f"not a precision of this backend ({', '.join(COMPUTE_TYPES)})"
    return gpu_fault() or _missing() or _gpu_fault(current_gpu(), _served(precision), precision)


def why_not_build(precision: str, options: BuildOptions) -> str | None:
    """Return why this machine cannot build `precision`; it needs no GPU for that."""
    if precision not in COMPUTE_TYPES:
        return f"not a precision of this backend ({', '.join(COMPUTE_TYPES)})"
    others = sorted(given_options(options).keys() - {"compute_capabilities", "report"})
    if others:
        return f"no {', '.join(others)}: the kernels are compiled already"
    served = _served(precision)
    unknown = [each for each in options.compute_capabilities if each not in served]
    if unknown:
        kernels = _kernels(precision)
        return f"no {kernels} for {', '.join(unknown)}, only for {', '.join(served)}"
    if find_spec("safetensors") is None:
        return "needs safetensors: pip install 'edje-runtime[gpu]'"
    return None


def compute_type(precision: str) -> str:
    """Return the type of weights and activations, in 8-bit precisions of those that are kept."""
    return COMPUTE_TYPES[precision]


def activation_scales(precision: str, sizes: ModelSizes) -> tuple[Scales, ...]:
    """Return how 8-bit activations are scaled: our kernels find scales while running."""
    return (Scales(DYNAMIC, never=NEVER_QUANTIZED),)


def device(precision: str, options: BuildOptions) -> dict[str, Any]:
    """Return the manifest's `device` entry: every architecture that the engine serves."""
    return {
        "kind": "cuda",
        "compute_capabilities": list(_targets(precision, options)),
        "cuda": LEAST_CUDA,
    }


def device_faults(manifest: EngineManifest) -> list[str]:
    """Compare the GPU, its driver and the tuning tables here with what the engine was built for."""
    served = manifest.device.get("compute_capabilities", ())
    built = manifest.build_options.get("tuning", {})
    faults = [
        f"tuning table of {each}: built with {built.get(each, 'none')[:12]}, this edje has "
        f"{read_tuning(each).sha256[:12]}"
        for each in served
        if each in tuned_capabilities() and built.get(each) != read_tuning(each).sha256
    ]
    if gpu_fault() is not None:
        return faults  # `why_not` says so
    fault = _gpu_fault(current_gpu(), served, manifest.precision)
    return faults if fault is None else [*faults, f"device: {fault}"]


def build(job: BuildJob) -> Mapping[str, Any]:
    """Write weights and plan."""
    from .build import build as build_engine  # needs onnx

    return build_engine(job, _targets(job.precision, job.options), COMPUTE_TYPES[job.precision])


def load(folder: Path, manifest: EngineManifest, options: OpenOptions) -> Engine:
    """Open the engine on the current GPU: its weights go there, its kernels are loaded."""
    raise_setting_faults(options)
    plan = Plan.read(folder)
    gpu = open_gpu("cuda_core", current_index())
    try:
        return NativeEngine(manifest, plan, read_weights(folder), gpu)
    except BaseException:
        gpu.close()
        raise


def _has_products(capability: str) -> bool:
    """Return whether a product of some kind runs on a GPU: those of 10.0 do not on 10.3."""
    kernels, tile = read_manifest().kernels, next(iter(POINTER_TILES))
    names = (name("float16", "none", tile) for name in (product_tma_name, product_name))
    return any(runs_on(kernels[name], capability_key(capability)) for name in names)


def _served(precision: str) -> tuple[str, ...]:
    """Return the compute capabilities that have kernels of a precision."""
    kind = KINDS.get(precision)
    return tuple(each for each in tuned_capabilities() if not kind or each in kind.capabilities)


def _targets(precision: str, options: BuildOptions) -> tuple[str, ...]:
    return options.compute_capabilities or _served(precision)


def _missing() -> str | None:
    """Return which package is missing, None where all are there."""
    missing = [name for name in NEEDED if not _is_there(name)]
    if missing:
        return f"needs {', '.join(missing)}: pip install 'edje-runtime[gpu]'"
    return None


def _is_there(name: str) -> bool:
    try:
        return name in sys.modules or find_spec(name) is not None
    except ModuleNotFoundError:  # of `cuda.core`: there is no `cuda` at all
        return False


def _gpu_fault(gpu: Gpu, served: tuple[str, ...], precision: str) -> str | None:
    """Return why `gpu` cannot run an engine for the compute capabilities `served`."""
    if serving_table(gpu.capability, served) is None:
        return (
            f"{gpu.name} has compute capability {gpu.capability}, the {_kernels(precision)} are "
            f"for {', '.join(served)}"
        )
    if not _has_products(gpu.capability):
        return (
            f"{gpu.name} has compute capability {gpu.capability}, and the products of this major "
            "version run on one chip only: add it in kernels/variant.py, then make kernels"
        )
    if capability_key(gpu.cuda_version) < capability_key(LEAST_CUDA):
        return (
            f"the driver serves CUDA {gpu.cuda_version}, the kernels need {LEAST_CUDA}: "
            "update NVIDIA's driver to r570 or later"
        )
    return None


def _kernels(precision: str) -> str:
    return f"{precision} kernels" if precision in KINDS else "kernels"
