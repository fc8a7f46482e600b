"""What this process may use of its machine: its CPU's instruction sets, cores and memory.

A container's limits count: a process that may use one core's time is as slow with eight threads,
and one that takes more memory than its container may have is killed.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .errors import EngineError

ROOT = Path("/")
_NO_LIMIT_BYTES = 1 << 62  # version 1 says "none" with the largest number of whole pages
_NOT_SET = (OSError, ValueError, ArithmeticError)  # no such file, `max` in place of a number, ...


class Group(NamedTuple):
    """One control group: the cgroup version of its hierarchy, and its folder."""

    version: int
    folder: Path


class Memory(NamedTuple):
    """What a group may hold and what it holds, in bytes, without files that would give way."""

    limit: int
    used: int


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return how many cores' time this process may use, None where nothing limits it.

    `root`, here and below, is the folder that holds `proc` and everything mounted.
    """
    return min(filter(None, map(_quota, groups("cpu", root))), default=None)


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """Return the bytes of memory that this process may hold, None where nothing limits it.

    `memory.high` limits like `memory.max`: beyond it the kernel slows the process down.
    """
    return min((found.limit for found in _memories(root)), default=None)


def free_memory_bytes(root: Path = ROOT) -> int | None:
    """Return how many bytes the limits still leave, None where nothing limits this process."""
    return min((max(0, limit - used) for limit, used in _memories(root)), default=None)


def groups(controller: str, root: Path = ROOT) -> Iterator[Group]:
    """Yield the groups whose limits on `controller` hold for this process, its own first.

    Yields nothing where the system has no cgroups. A container may see less than the path that
    the kernel gives: its mount starts further down, or the process was moved to a group outside
    of it. The mount's top is the best that can be known then.
    """
    paths, mounts = _own_paths(root), list(_mounts(controller, root))
    for version, name in ((2, ""), (1, controller)):
        path = paths.get(name)
        if path is None:
            continue
        mine = [(start, folder) for found, start, folder in mounts if found == version]
        shown = [(start, folder) for start, folder in mine if _holds(start, path)]
        for start, folder in shown:
            place = path.relative_to(start)
            yield from (Group(version, folder / part) for part in (place, *place.parents))
        if not shown:
            yield from (Group(version, folder) for _, folder in mine)


def _holds(start: PurePosixPath, path: PurePosixPath) -> bool:
    """Whether a mount that starts at the group `start` shows the group `path`."""
    return ".." not in path.parts and path.is_relative_to(start)


def _own_paths(root: Path) -> dict[str, PurePosixPath]:
    """Return this process's group by controller; version 2 has one for all, under `""`."""
    paths: dict[str, PurePosixPath] = {}
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text("utf-8", "replace").splitlines():
            _, controllers, path = line.split(":", 2)
            paths.update(dict.fromkeys(controllers.split(","), PurePosixPath(path)))
    return paths


def _mounts(controller: str, root: Path) -> Iterator[tuple[int, PurePosixPath, Path]]:
    """Yield version, shown group and folder of the mounted hierarchies that may limit."""
    lines: list[str] = []
    with suppress(OSError):
        lines = (root / "proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
    for line in lines:
        fields, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.partition(" ")
        if kind == "cgroup2" or (kind == "cgroup" and controller in re.split("[ ,]", options)):
            start, folder = map(_unescaped, fields.split()[3:5])
            version = 2 if kind == "cgroup2" else 1
            yield version, PurePosixPath(start), root / folder.lstrip("/")


def _unescaped(name: str) -> str:
    """Return a path of `mountinfo` as it is: blanks stand there as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), name)


def _quota(group: Group) -> float | None:
    """Return the cores' time that one group may use, None: any."""
    with suppress(*_NOT_SET):
        if group.version == 2:
            text = (group.folder / "cpu.max").read_text("ascii")
        else:
            files = (group.folder / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
            text = " ".join(path.read_text("ascii") for path in files)
        quota, period = map(int, text.split())
        return quota / period if quota > 0 else None
    return None


def _memories(root: Path) -> Iterator[Memory]:
    """Yield limit and use of every group that has a limit."""
    for group in groups("memory", root):
        if group.version == 2:
            limits = [*_numbers(group, "memory.max"), *_numbers(group, "memory.high")]
            used, cached = _numbers(group, "memory.current"), "inactive_file"
        else:
            limits = _numbers(group, "memory.limit_in_bytes")
            used, cached = _numbers(group, "memory.usage_in_bytes"), "total_inactive_file"
        if limits and min(limits) < _NO_LIMIT_BYTES:
            facts = _facts(group.folder / "memory.stat")
            yield Memory(min(limits), max(0, sum(used) - facts.get(cached, 0)))


def _numbers(group: Group, name: str) -> list[int]:
    """Return the number that a file of a group holds; none where it is not set."""
    with suppress(*_NOT_SET):
        return [int((group.folder / name).read_text("ascii"))]
    return []


def _facts(path: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    with suppress(*_NOT_SET):
        lines = (line.split() for line in path.read_text("ascii").splitlines())
        return {words[0]: int(words[1]) for words in lines}
    return {}


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
    limit = _features_limit() or FEATURES
    return tuple(name for name in FEATURES if name in _cpu_info(root)[1] and name in limit)


def hidden_features(root: Path = ROOT) -> tuple[str, ...]:
    """Return the instruction sets that this CPU has and EDJE_CPU_FEATURES keeps from use.

    Raises:
        EngineError: as `cpu_features`.
    """
    limit = _features_limit() or FEATURES
    return tuple(name for name in FEATURES if name in _cpu_info(root)[1] and name not in limit)


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
    """
    return _quota_cores(root) or _affine_cores()


def whole_cores(root: Path = ROOT) -> int:
    """Return how many threads of arithmetic can work at once: as `usable_cores`, whole cores only.

    The two threads of a core share its arithmetic units.
    """
    cores = len({_siblings(root, number) for number in _affine_numbers()})
    return min(cores, _quota_cores(root) or cores)


def thread_limit(*, sees_affinity: bool, root: Path = ROOT) -> int | None:
    """Return how many threads a library must be told to start, None where it counts right itself.

    No library looks at the quota. Where nothing limits this process, it counts better than
    `usable_cores`: one thread where two cores are the halves of one.

    Args:
        sees_affinity: whether the library looks at the cores that this process may run on.
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
    return len(_affine_numbers())


def _affine_numbers() -> Collection[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return range(os.cpu_count() or 1)


def _siblings(root: Path, number: int) -> str:
    """Return what the threads of one core have in common; its own number where nobody tells."""
    topology = root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
    with suppress(OSError):
        return topology.read_text("ascii").strip()
    return str(number)


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
