"""Counters count what happened, the same every time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from edje.kernels.device.cuda_core import CudaCoreDevice
from edje.kernels.device.host import HostDevice
from edje.perf.counters import PROFILED, Counters, Profile, open_shared
from pretended_gpu import CUBIN

linux = pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="no /proc/self/io")


@pytest.fixture
def counters():
    """Counters of this process; its profile ends with the test."""
    profile = Profile(open_shared(None))
    before = sys.getprofile(), threading.getprofile()
    profile.install()
    yield Counters(profile, [], [os.getpid()])
    sys.setprofile(before[0])
    threading.setprofile(before[1])


def exact(found, name):
    """Return a counter that was the same in every run."""
    low, high = found[name]
    assert low == high, f"{name}: {low} to {high}"
    return low


def test_calls_from_python_to_python_and_to_c(counters):
    def callee():
        return len("abc")

    def run(times):
        for _ in range(times):
            callee()

    few, many = (counters.of(lambda n=n: run(n), 3) for n in (10, 110))
    assert exact(many, "python_calls") - exact(few, "python_calls") == 100
    assert exact(many, "c_calls") - exact(few, "c_calls") == 100


def test_blocks_and_peaks(counters):
    def keep(number):
        kept = [(at, -at) for at in range(1000, 1000 + number)]
        len(kept)

    few, many = (counters.of(lambda n=n: keep(n), 3) for n in (10, 110))
    assert many["allocated_blocks"][0] - few["allocated_blocks"][1] >= 100
    assert many["allocated_blocks"][1] - many["allocated_blocks"][0] <= 3
    held = counters.of(lambda: np.zeros(1 << 20, np.uint8).sum(), 3)
    assert 1 << 20 <= held["peak_bytes"][0] <= held["peak_bytes"][1] < (1 << 20) + (1 << 18)


@linux
def test_reads_and_writes_of_the_system(counters, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(4096))
    file = os.open(path, os.O_RDWR)

    def run():
        os.pread(file, 1000, 0)
        os.pread(file, 500, 1000)
        os.pwrite(file, b"abc", 0)

    found = counters.of(run, 3)
    os.close(file)
    assert [exact(found, name) for name in ("read_calls", "read_bytes")] == [2, 1500]
    assert [exact(found, name) for name in ("write_calls", "written_bytes")] == [1, 3]


def test_what_a_device_is_asked_for(counters):
    device = HostDevice()
    pinned = device.pinned(64, np.dtype(np.float32))
    memory, event = device.mirror(pinned), device.event()
    stream = device.stream()

    def run():
        stream.upload(memory, pinned, 48)
        stream.submit(lambda: None)
        stream.submit(lambda: None)
        stream.download(pinned, memory, 16)
        stream.record(event)
        event.synchronize()

    found = counters.of(run, 3)
    device.close()
    counted = {name: exact(found, name) for name in PROFILED[3:]}
    assert counted == {
        "kernel_launches": 0,
        "graph_launches": 0,
        "uploads": 1,
        "downloads": 1,
        "moved_elements": 64,
        "host_work": 2,
        "event_records": 1,
        "event_waits": 1,
    }


def test_launches_of_kernels_and_graphs_on_a_pretended_gpu(counters, pretended_gpu):
    device = CudaCoreDevice()
    with device.current():
        stream, pinned = device.stream(), device.pinned(8, np.dtype(np.int8))
        mirror = device.mirror(pinned)
        kernel = device.load_module(CUBIN).kernel("gather_tokens")
        graph = device.capture(lambda on: on.upload(mirror, pinned, 8), stream)
        arguments = [np.uint64(4096), np.int32(7)]

        def run():
            kernel.launch(
                stream, grid=(8, 1, 1), block=(128, 1, 1), shared_bytes=0, arguments=arguments
            )
            graph.launch(stream)
            graph.launch(stream)

        found = counters.of(run, 3)
    device.close()
    assert exact(found, "kernel_launches") == 1
    assert exact(found, "graph_launches") == 2


def test_nothing_is_nothing(counters):
    found = counters.of(lambda: None, 3)
    assert all(high == 0 for name, (_, high) in found.items() if name != "peak_bytes")


def test_another_process_counts_into_a_file(tmp_path):
    module = tmp_path / "counted_module.py"
    module.write_text(
        "import sys\n"
        "def step(): pass\n"
        "sys.stdin.readline()\n"
        "for _ in range(int(sys.argv[1])): step()\n"
        "print('done', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    file = tmp_path / "counts"
    words = [sys.executable, "-m", "edje.perf.counters", str(file), "counted_module", "1000"]
    child = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    shared = Profile(open_shared(file))
    shared.arm(True)
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "done\n"
    found = shared.values[0]
    child.communicate("\n")
    assert child.returncode == 0
    assert 1000 <= found < 1100
