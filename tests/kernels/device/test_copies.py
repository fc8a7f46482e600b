"""Copies are measured through the device's own calls; those that block are told from others."""

from contextlib import closing

import pytest

from edje.errors import EngineError
from edje.kernels.device import GPU_DEVICES, open_gpu
from edje.kernels.device.host import HostDevice
from edje.kernels.device.measuring import CopySpeed, measure_copies
from pretended_gpu import pretend_gpu


@pytest.mark.parametrize(
    ("gb_per_s", "call_us", "blocks"),
    [
        (54.8, 7.4, False),  # memory of cuMemHostAlloc on an H200, 50 MB
        (7.2, 7016.5, True),  # a pool's
        (9.3, 5417.2, True),  # pageable
        (12.0, 20.0, False),  # a slow link does not block
    ],
)
def test_a_call_that_takes_as_long_as_its_copy_blocks(gb_per_s, call_us, blocks):
    speed = CopySpeed(50_331_648, gb_per_s, call_us)
    assert speed.blocks is blocks
    assert ("as with pageable memory" in speed.describe()) is blocks
    assert f"{gb_per_s:.1f} GB/s" in speed.describe()


@pytest.mark.parametrize("name", GPU_DEVICES)
def test_random_bytes_of_pinned_memory_are_copied(name, monkeypatch):
    machine = pretend_gpu(monkeypatch)
    with closing(open_gpu(name)) as device:
        speed = measure_copies(device, 4096)
        pinned, mirror = (bytes(memory) for memory in machine.memory.values())
    assert len(set(pinned)) > 100
    assert mirror == pinned
    assert {num_bytes for num_bytes, _ in machine.named("copy")} == {4096}
    assert speed.num_bytes == 4096
    assert speed.gb_per_s == pytest.approx(4096 / 1e6)  # the stand-in's clock: a ms an event
    assert speed.call_us > 0
    assert not any(machine.alive.values())


def test_memory_that_is_shared_is_not_copied():
    with closing(HostDevice()) as device, pytest.raises(EngineError, match="nothing is copied"):
        measure_copies(device)
