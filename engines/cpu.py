"""What CPU backends share: which instruction sets a precision needs, and what a CPU lacks."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import machine
from ..machine import BFLOAT16, FLOAT, INT8, cpu_model, is_x86
from ..machine import usable_cores as usable_cores
from .build_options import BuildOptions
from .manifest import EngineManifest

_BF16_PRODUCTS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
_VNNI = {"avx_vnni", "avx512_vnni", "amx_int8"}
FEATURES_OF_PRECISION: Mapping[str, tuple[str, ...]] = {
    "fp32": FLOAT,
    "bf16": FLOAT + BFLOAT16,
    "int8": FLOAT + INT8,
}


def why_no_vnni() -> str | None:
    """Return why signed weights of 8 bits would overflow on this CPU, None where they cannot.

    x86 without VNNI adds pairs of byte products in 16 bits: an unsigned and a signed byte give up
    to 255 * 127, and two of those are too many, unnoticed. With weights of 7 bits they are not
    (`weights_fit_16_bits`). Others have no such instruction; without a dot product they are only
    slow.
    """
    if not is_x86() or _VNNI & set(cpu_features("int8")):
        return None
    if _VNNI & set(machine.hidden_features()):
        return f"{machine.FEATURES_LIMIT} keeps this CPU's VNNI from use: sums of int8 overflow"
    return "this CPU has neither AVX512_VNNI nor AVX_VNNI nor AMX_INT8: sums of int8 overflow"


def weights_fit_16_bits(weights: npt.NDArray[np.int8]) -> bool:
    """Tell whether no two products of unsigned bytes and `weights` add up to more than 16 bits."""
    largest = np.abs(weights.astype(np.int16)).max(initial=0)
    return bool(2 * 255 * int(largest) <= np.iinfo(np.int16).max)


def why_no_bf16() -> str | None:
    """Return why bfloat16 may not be used although the CPU has it, None where it may."""
    hidden, usable = machine.hidden_features(), cpu_features("bf16")
    if _BF16_PRODUCTS & set(hidden) and not _BF16_PRODUCTS & set(usable):
        return f"{machine.FEATURES_LIMIT} keeps this CPU's bfloat16 products from use"
    return None


def cpu_features(precision: str | None = None) -> tuple[str, ...]:
    """Return the usable instruction sets that matter to `precision` (None: to any), in order."""
    names = machine.FEATURES if precision is None else FEATURES_OF_PRECISION.get(precision, FLOAT)
    usable = machine.cpu_features()
    return tuple(name for name in names if name in usable)


def describe_cpu(precision: str) -> dict[str, Any]:
    """Return the `device` entry of an engine manifest for this CPU."""
    return {
        "kind": "cpu",
        "architecture": platform.machine(),
        "model": cpu_model(),
        "features": list(cpu_features(precision)),
    }


def compute_type(precision: str) -> str:
    """Return `float32`: the CPU's kernels start from float32 graphs in every precision."""
    return "float32"


def device(precision: str, options: BuildOptions) -> dict[str, Any]:
    """Return this CPU as the manifest's `device` entry."""
    return describe_cpu(precision)


def option_fault(options: BuildOptions) -> str | None:
    """Return which build options were set: CPU backends have none of them."""
    unknown = [field.name for field in fields(options) if getattr(options, field.name)]
    return f"this backend has no {', '.join(unknown)}" if unknown else None


def device_faults(manifest: EngineManifest) -> list[str]:
    """Compare the CPU an engine was built for with this one. More features are welcome."""
    built_for, here = manifest.device, describe_cpu(manifest.precision)
    faults = [
        f"device {key}: built for {built_for.get(key)!r}, this is {here[key]!r}"
        for key in ("kind", "architecture")
        if built_for.get(key) != here[key]
    ]
    features = built_for.get("features")
    wanted = features if isinstance(features, list) else []
    missing = [str(name) for name in wanted if name not in here["features"]]
    if missing:
        hidden = set(missing) <= set(machine.hidden_features())
        lacks = f"{machine.FEATURES_LIMIT} keeps from use" if hidden else "this CPU lacks"
        faults.append(
            f"device features: built with {', '.join(missing)}, which {lacks} ({here['model']})"
        )
    return faults
