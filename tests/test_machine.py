"""What this process may use: the CPU's instruction sets, its cores and memory, within limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edje import machine
from edje.errors import EngineError

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
