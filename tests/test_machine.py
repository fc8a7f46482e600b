"""What this process may use: the CPU's instruction sets, its cores and memory, within limits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from edje import machine
from edje.errors import EngineError
from edje.machine import cpu_quota, free_memory_bytes, memory_limit_bytes

GIB = 1 << 30
FLAGS = "fpu sse2 avx2 fma avx512f avx512_vnni avx512_bf16"
USABLE = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system with 16 GiB, 6 of them free, whose own group is the top of its cgroups."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"model name\t: A CPU\nflags\t\t: {FLAGS}\n")
    meminfo = f"MemTotal: {16 << 20} kB\nMemAvailable: {6 << 20} kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    mount = "31 23 0:28 / /sys rw - cgroup2 cgroup2 rw\n"
    (tmp_path / "proc/self/mountinfo").write_text(mount)
    return tmp_path


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


@pytest.fixture(autouse=True)
def no_features_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDJE_CPU_FEATURES", raising=False)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", 8),
        ("100000 100000", 1),
        ("150000 100000", 2),
        ("20000 100000", 1),
        ("400000 100000", 4),
        ("800000 100000", 8),
        ("6400000 100000", 8),
    ],
)
def test_cores_are_those_of_the_quota_rounded_up(root, quota, cores):
    (root / "sys/cpu.max").write_text(quota)
    assert machine.usable_cores(root) == cores
    told = None if cores == 8 else cores
    assert machine.thread_limit(sees_affinity=True, root=root) == told
    assert machine.thread_limit(sees_affinity=False, root=root) == told


@pytest.mark.usefixtures("eight_cores")
def test_cores_that_the_process_may_not_run_on_do_not_count(root, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5, 7})
    (root / "sys/cpu.max").write_text("600000 100000")
    assert machine.usable_cores(root) == 3
    assert machine.thread_limit(sees_affinity=True, root=root) is None
    assert machine.thread_limit(sees_affinity=False, root=root) == 3


@pytest.mark.usefixtures("eight_cores")
def test_the_two_threads_of_a_core_are_one_whole_core(root):
    assert machine.whole_cores(root) == 8  # nobody tells which belong together
    for number in range(8):
        topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    assert machine.whole_cores(root) == 4
    (root / "sys/cpu.max").write_text("250000 100000")
    assert machine.whole_cores(root) == 3


def test_memory_is_the_containers_where_it_may_take_less(root):
    assert machine.available_memory_bytes(root) == 6 * GIB
    assert machine.memory_bytes(root) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (root / "sys/memory.max").write_text(str(GIB // 4))
    (root / "sys/memory.current").write_text(str(GIB // 16))
    assert machine.memory_bytes(root) == GIB // 4
    assert machine.available_memory_bytes(root) == GIB // 4 - GIB // 16
    (root / "sys/memory.max").write_text(str(1 << 50))
    assert machine.available_memory_bytes(root) == 6 * GIB


def test_a_system_that_tells_nothing_has_cores_and_memory(tmp_path):
    assert machine.usable_cores(tmp_path) >= 1
    assert machine.memory_bytes(tmp_path) >= machine.available_memory_bytes(tmp_path) > 0
    assert machine.cpu_features(tmp_path) == machine.hidden_features(tmp_path) == ()


def test_features_are_the_ones_that_matter_in_order(root):
    assert machine.cpu_features(root) == USABLE
    assert machine.hidden_features(root) == ()


@pytest.mark.parametrize(
    ("limit", "usable"),
    [
        ("avx2,fma", ("avx2", "fma")),
        (" fma, avx2 ,", ("avx2", "fma")),
        ("avx2,fma,amx_int8,amx_tile", ("avx2", "fma")),  # never what the CPU lacks
        (",".join(machine.FEATURES), USABLE),
        ("", USABLE),
    ],
)
def test_a_lesser_cpu_can_be_asked_for(root, monkeypatch, limit, usable):
    monkeypatch.setenv("EDJE_CPU_FEATURES", limit)
    assert machine.cpu_features(root) == usable
    assert machine.hidden_features(root) == tuple(name for name in USABLE if name not in usable)


def test_unknown_instruction_sets_are_named(root, monkeypatch):
    monkeypatch.setenv("EDJE_CPU_FEATURES", "avx2,avx512vnni,sse9")
    with pytest.raises(EngineError, match=r"avx512vnni, sse9 decides nothing.* some of avx2"):
        machine.cpu_features(root)


def test_programs_find_the_cores_where_they_were():
    code = "from edje.engines.cpu import usable_cores; print(usable_cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == machine.usable_cores()


def test_a_real_quota_is_obeyed(tmp_path):
    """In a group of its own, where this process may make one."""
    top = Path("/sys/fs/cgroup")
    version_1 = (top / "cpu" / "cgroup.procs").exists()
    group = (top / "cpu" if version_1 else top) / f"edje_test_{os.getpid()}"
    limits = {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"}
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "from edje.runtime.cli.doctor import examine; print(examine().num_cpus)"
    )
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        for name, value in (limits if version_1 else {"cpu.max": "100000 100000"}).items():
            (group / name).write_text(value)
        command = [sys.executable, "-c", code, str(group / "cgroup.procs")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        pytest.skip(f"no quota can be set here: {error}")
    finally:
        group.rmdir()
    assert int(done.stdout) == 1


# The limits of control groups. Trees are files as Linux shows them: `proc/self/cgroup` says which
# group this is, `mountinfo` which part of the hierarchy is mounted where.

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
