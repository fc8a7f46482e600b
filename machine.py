"""What this process may use of its machine: its CPU's instruction sets, cores and memory.

A container's limits count: a process that may use one core's time is as slow with eight threads,
and one that takes more memory than its container may have is killed.
"""

from __future__ import annotations

import math
import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path

from .cgroups import ROOT, cpu_quota, free_memory_bytes, memory_limit_bytes
from .errors import EngineError

# Instruction sets that matter to some precision, as Linux spells them in /proc/cpuinfo (x86-64
# `flags`, AArch64 `Features`).
FLOAT = ("avx2", "fma", "avx512f", "asimd", "sve")
BFLOAT16 = ("avx512_bf16", "amx_tile", "amx_bf16", "bf16", "svebf16")
INT8 = ("avx_vnni", "avx512_vnni", "amx_tile", "amx_int8", "asimddp", "i8mm")
FEATURES = tuple(dict.fromkeys((*FLOAT, *BFLOAT16, *INT8)))
FEATURES_LIMIT = "EDJE_CPU_FEATURES"


def is_x86() -> bool:
    """Return whether this is an x86-64 CPU."""
    return platform.machine().lower() in ("x86_64", "amd64")


def cpu_model() -> str:
    """Return the CPU's name, or its architecture where the system does not tell."""
    return _cpu_info(ROOT)[0] or platform.processor() or platform.machine()


def cpu_features(root: Path = ROOT) -> tuple[str, ...]:
    """Return the instruction sets of `FEATURES` that may be used, in their order.

    These are this CPU's. Where EDJE_CPU_FEATURES lists some (`avx2,fma`), the others count as
    missing, so that what is built runs on a CPU that lacks them.

    Raises:
        EngineError: EDJE_CPU_FEATURES names what is not in `FEATURES`.
    """
    limit = _features_limit()
    flags = _cpu_info(root)[1]
    return tuple(name for name in FEATURES if name in flags and (not limit or name in limit))


def hidden_features(root: Path = ROOT) -> tuple[str, ...]:
    """Return the instruction sets that this CPU has and EDJE_CPU_FEATURES keeps from use.

    Raises:
        EngineError: as `cpu_features`.
    """
    limit = _features_limit()
    flags = _cpu_info(root)[1]
    return tuple(name for name in FEATURES if name in flags and limit and name not in limit)


def _features_limit() -> frozenset[str]:
    """Return what EDJE_CPU_FEATURES lists; nothing where it is not set."""
    value = os.environ.get(FEATURES_LIMIT, "")
    names = frozenset(name.strip() for name in value.split(",")) - {""}
    unknown = sorted(names - set(FEATURES))
    if unknown:
        raise EngineError(
            f"{FEATURES_LIMIT} is {value!r}: {', '.join(unknown)} decides nothing here, "
            f"expected some of {', '.join(FEATURES)}",
            hint=f"unset {FEATURES_LIMIT}, or list what the CPU that shall run the engine has",
        )
    return names


def usable_cores(root: Path = ROOT) -> int:
    """Return how many threads can work at once: cores this process may run on, or its quota's.

    A quota of 1.5 cores gives 2: one thread would leave a third of it unused, while of two each
    waits now and then. (Java and Go round up as well.)

    Args:
        root: folder that holds `proc` and everything mounted.
    """
    return _quota_cores(root) or _affine_cores()


def thread_limit(*, sees_affinity: bool, root: Path = ROOT) -> int | None:
    """Return how many threads a library must be told to start, None where it counts right itself.

    No library looks at the quota. Where nothing limits this process, it counts better than
    `usable_cores`: one thread where two cores are the halves of one.

    Args:
        sees_affinity: whether the library looks at the cores that this process may run on.
        root: folder that holds `proc` and everything mounted.
    """
    if sees_affinity:
        return _quota_cores(root)
    cores = usable_cores(root)
    return cores if cores < (os.cpu_count() or 1) else None


def _quota_cores(root: Path) -> int | None:
    """Return the cores that the quota leaves, None where it takes none away."""
    quota = cpu_quota(root)
    return None if quota is None or quota >= _affine_cores() else max(1, math.ceil(quota))


def _affine_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes(root: Path = ROOT) -> int:
    """Return how much memory this process may take: the machine's, or its container's."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory_limit_bytes(root)
    return total if limit is None else min(total, limit)


def available_memory_bytes(root: Path = ROOT) -> int:
    """Return how much memory this process may still take: the machine's, or its container's."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, LookupError, ValueError):  # with what the page cache would give up
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
        facts = dict(line.split(":", 1) for line in lines)
        available = int(facts["MemAvailable"].split()[0]) << 10
    free = free_memory_bytes(root)
    return available if free is None else min(available, free)


@cache
def _cpu_info(root: Path) -> tuple[str, frozenset[str]]:
    """Return model name and flags of the first CPU; empty where there is no /proc/cpuinfo."""
    try:
        lines = (root / "proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return "", frozenset()
    entries: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        entries.setdefault(key.strip(), value.strip())
    flags = entries.get("flags") or entries.get("Features") or ""
    return entries.get("model name", ""), frozenset(flags.split())
