"""The limits of a container: CPU time and memory that its control groups (cgroups) leave it.

A limit of any group above this process holds as well as its own group's. Both versions are read,
also side by side: version 2 keeps `cpu.max` and `memory.max`, version 1 has a hierarchy for each
controller with `cpu.cfs_quota_us` and `memory.limit_in_bytes`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

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

    Args:
        root: folder that holds `proc` and everything mounted.
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
