"""What this CPU is and which of its instruction sets a precision's kernels may use."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from .contract import BuildOptions
from .manifest import EngineManifest

# Names as Linux spells them in /proc/cpuinfo (x86-64 `flags`, AArch64 `Features`).
_FLOAT = ("avx2", "fma", "avx512f", "asimd", "sve")
_BFLOAT16 = ("avx512_bf16", "amx_tile", "amx_bf16", "bf16", "svebf16")
_INT8 = ("avx_vnni", "avx512_vnni", "amx_tile", "amx_int8", "asimddp", "i8mm")
_VNNI = {"avx_vnni", "avx512_vnni", "amx_int8"}
FEATURES_OF_PRECISION: Mapping[str, tuple[str, ...]] = {
    "fp32": _FLOAT,
    "bf16": _FLOAT + _BFLOAT16,
    "int8": _FLOAT + _INT8,
}

# Activations of 16 pairs (80 slots x 1,536 x 4 bytes each) still pass through one core's L2 and
# share of the L3. CPU time a pair, full-size scorer, OpenVINO f32 on one core of a Xeon with 2 MB
# L2: 27.0 ms at 8 pairs, 27.2 at 16, 27.9 at 32, 32.2 at 64, 35.4 at 128.
PAIRS_PER_THREAD = 16


def is_x86() -> bool:
    """Return whether this is an x86-64 CPU."""
    return platform.machine().lower() in ("x86_64", "amd64")


def why_no_int8() -> str | None:
    """Return why int8 products would be wrong on this CPU, None where they are right.

    x86 without VNNI adds pairs of byte products in 16 bits, which overflow unnoticed. Others have
    no such instruction; without a dot product they are only slow.
    """
    if not is_x86() or _VNNI & set(cpu_features("int8")):
        return None
    return "this CPU has neither AVX512_VNNI nor AVX_VNNI nor AMX_INT8: sums of int8 overflow"


def pairs_per_forward(num_threads: int | None) -> int:
    """Return how many pairs one forward on `num_threads` (None: all cores) should take."""
    return PAIRS_PER_THREAD * (num_threads or usable_cores())


def usable_cores() -> int:
    """Return how many cores this process may run on (a container may have fewer than the CPU)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_features(precision: str | None = None) -> tuple[str, ...]:
    """Return this CPU's instruction sets that matter to `precision` (None: to any), in order."""
    if precision is None:
        names = tuple(dict.fromkeys((*_FLOAT, *_BFLOAT16, *_INT8)))
    else:
        names = FEATURES_OF_PRECISION.get(precision, _FLOAT)
    flags = _cpu_info()[1]
    return tuple(name for name in names if name in flags)


def cpu_model() -> str:
    """Return the CPU's name, or its architecture where the system does not tell."""
    return _cpu_info()[0] or platform.processor() or platform.machine()


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
        faults.append(
            f"device features: built with {', '.join(missing)}, "
            f"which this CPU ({here['model']}) lacks"
        )
    return faults


@cache
def _cpu_info() -> tuple[str, frozenset[str]]:
    """Return model name and flags of the first CPU; empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "", frozenset()
    entries: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        entries.setdefault(key.strip(), value.strip())
    flags = entries.get("flags") or entries.get("Features") or ""
    return entries.get("model name", ""), frozenset(flags.split())
