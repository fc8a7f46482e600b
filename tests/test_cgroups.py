"""The limits of the process's control groups are found, however the system mounts them.

The trees are files as Linux shows them: `proc/self/cgroup` says which group this is, `mountinfo`
which part of the hierarchy is mounted where.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from edje.machine import cpu_quota, free_memory_bytes, memory_limit_bytes

GIB = 1 << 30
V2 = "31 23 0:28 {start} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "{number} 31 0:29 {start} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}"
UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
NO_LIMIT_V1 = "9223372036854771712"


def write_tree(root: Path, groups: str, mounts: list[str], files: Mapping[str, object]) -> Path:
    """Write a pretended system; `files` by their path below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups + "\n")
    other = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"
    (root / "proc/self/mountinfo").write_text("\n".join([other, *mounts]) + "\n")
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def v2(root: Path, files: Mapping[str, object], *, path: str = "/", start: str = "/") -> Path:
    return write_tree(root, f"0::{path}", [V2.format(start=start)], files)


def v1(root: Path, files: Mapping[str, object], *, path: str = "/", start: str = "/") -> Path:
    names = ("cpu,cpuacct", "memory")
    groups = "\n".join([*(f"{n}:{name}:{path}" for n, name in enumerate(names, 1)), "0::/"])
    mounts = [V1.format(number=n, start=start, name=name) for n, name in enumerate(names, 40)]
    return write_tree(root, groups, [*mounts, UNIFIED], files)


def v1_cpu(folder: str, quota: int, period: int = 100000) -> dict[str, object]:
    place = f"cpu,cpuacct{folder}"
    return {f"{place}/cpu.cfs_quota_us": quota, f"{place}/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("content", "cores"),
    [("150000 100000", 1.5), ("25000 50000", 0.5), ("max 100000", None), ("", None), ("1 0", None)],
)
def test_the_quota_of_version_2_is_read(tmp_path, content, cores):
    assert cpu_quota(v2(tmp_path, {"cpu.max": content})) == cores


@pytest.mark.parametrize(("quota", "cores"), [(250000, 2.5), (-1, None), (0, None)])
def test_the_quota_of_version_1_is_read(tmp_path, quota, cores):
    assert cpu_quota(v1(tmp_path, v1_cpu("", quota))) == cores


def test_the_tightest_limit_above_the_own_group_holds(tmp_path):
    files = {
        "cpu.max": "800000 100000",
        "pods.slice/cpu.max": "200000 100000",
        "pods.slice/one/cpu.max": "max 100000",
        "pods.slice/other/cpu.max": "100000 100000",
        "pods.slice/memory.max": 4 * GIB,
        "pods.slice/one/memory.max": 6 * GIB,
    }
    root = v2(tmp_path, files, path="/pods.slice/one")
    assert cpu_quota(root) == 2
    assert memory_limit_bytes(root) == 4 * GIB


def test_version_1_looks_at_the_parents_too(tmp_path):
    files = {
        **v1_cpu("/docker", 300000),
        **v1_cpu("/docker/abc", -1),
        "memory/docker/memory.limit_in_bytes": 3 * GIB,
        "memory/docker/abc/memory.limit_in_bytes": NO_LIMIT_V1,
    }
    root = v1(tmp_path, files, path="/docker/abc")
    assert cpu_quota(root) == 3
    assert memory_limit_bytes(root) == 3 * GIB


def test_a_mount_that_starts_at_the_containers_group_is_its_group(tmp_path):
    """Docker without a cgroup namespace: the path is the host's, the mount shows its end only."""
    files = {**v1_cpu("", 100000), **v1_cpu("/docker/abc", 700000), **v1_cpu("/deep", 50000)}
    assert cpu_quota(v1(tmp_path / "own", files, path="/docker/abc", start="/docker/abc")) == 1
    inner = v1(tmp_path / "inner", files, path="/docker/abc/deep", start="/docker/abc")
    assert cpu_quota(inner) == 0.5


@pytest.mark.parametrize("path", ["/", "/pods", "/../..", "/../other/job"])
@pytest.mark.parametrize("tree", [v1, v2])
def test_a_group_above_or_beside_the_mount_takes_the_mounts_top(tmp_path, tree, path):
    files = {
        "cpu.max": "200000 100000",
        "memory.max": GIB,
        **v1_cpu("", 200000),
        "memory/memory.limit_in_bytes": GIB,
    }
    root = tree(tmp_path, files, path=path, start="/pods/one")
    assert cpu_quota(root) == 2
    assert memory_limit_bytes(root) == GIB


def test_hybrid_systems_take_the_tighter_of_both(tmp_path):
    files = {**v1_cpu("/job", 400000), "unified/cpu.max": "300000 100000"}
    assert cpu_quota(v1(tmp_path, files, path="/job")) == 3


def test_a_mount_point_with_a_blank_is_found(tmp_path):
    mount = V2.format(start="/").replace("/sys/fs/cgroup", r"/sys/fs/cgroup/my\040groups")
    root = write_tree(tmp_path, "0::/", [mount], {"my groups/cpu.max": "100000 100000"})
    assert cpu_quota(root) == 1


@pytest.mark.parametrize("missing", ["proc", "proc/self/cgroup", "proc/self/mountinfo"])
def test_systems_without_cgroups_have_no_limits(tmp_path, missing):
    root = v2(tmp_path, {"cpu.max": "100000 100000", "memory.max": GIB})
    (root / missing).rename(root / "elsewhere")
    assert cpu_quota(root) is memory_limit_bytes(root) is free_memory_bytes(root) is None


@pytest.mark.parametrize(
    ("most", "high", "limit"),
    [(2 * GIB, "max", 2 * GIB), ("max", GIB, GIB), (GIB, 3 * GIB, GIB), ("max", "max", None)],
)
def test_the_lower_of_memory_max_and_high_limits(tmp_path, most, high, limit):
    assert memory_limit_bytes(v2(tmp_path, {"memory.max": most, "memory.high": high})) == limit


def test_no_limit_of_version_1_is_none(tmp_path):
    root = v1(tmp_path, {"memory/memory.limit_in_bytes": NO_LIMIT_V1})
    assert memory_limit_bytes(root) is free_memory_bytes(root) is None


def test_files_that_the_cache_gives_up_are_free(tmp_path):
    version_2 = {
        "memory.max": 8 * GIB,
        "memory.current": 5 * GIB,
        "memory.stat": f"anon {GIB}\ninactive_file {2 * GIB}",
    }
    version_1 = {
        "memory/memory.limit_in_bytes": 8 * GIB,
        "memory/memory.usage_in_bytes": 5 * GIB,
        "memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {2 * GIB}",
    }
    assert free_memory_bytes(v2(tmp_path / "2", version_2)) == 5 * GIB
    assert free_memory_bytes(v1(tmp_path / "1", version_1)) == 5 * GIB


def test_a_full_group_leaves_nothing(tmp_path):
    files = {
        "memory.max": 8 * GIB,
        "memory.current": GIB,
        "one/memory.max": GIB,
        "one/memory.current": GIB + 4096,
    }
    assert free_memory_bytes(v2(tmp_path, files, path="/one")) == 0
