"""How fast a device's copies from pinned memory are, and whether they return at once.

A copy that blocks its caller cannot overlap with anything: the pipeline then reaches half of the
engine's speed. Memory that only looks pinned (a pool's on some drivers) shows it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from ...errors import EngineError
from .contract import Device

COPY_BYTES = 1024 * 49_152  # a full batch of 1,024 records of 64 x 384 float16
NUM_COPIES = 5
_BLOCKING_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class CopySpeed:
    """Copies from a device's pinned host memory to the device.

    Attributes:
        num_bytes: of one copy.
        gb_per_s: 1e9 bytes a second, the best of a few copies.
        call_us: least time that the call took of its thread.
    """

    num_bytes: int
    gb_per_s: float
    call_us: float

    @property
    def blocks(self) -> bool:
        """Whether the call waits for the copy, as it does with pageable memory."""
        return self.call_us >= _BLOCKING_SHARE * self.num_bytes / self.gb_per_s / 1e3

    def describe(self) -> str:
        """Return the figures in one line, with a warning where copies block."""
        text = f"{self.gb_per_s:.1f} GB/s from pinned memory, {self.call_us:.0f} us a call"
        if not self.blocks:
            return text
        return f"{text}: the call waits for the copy, as with pageable memory"


def measure_copies(device: Device, num_bytes: int = COPY_BYTES) -> CopySpeed:
    """Copy random bytes to a device that has memory of its own; return the best of a few.

    Its memory is the device's until it is closed.

    Raises:
        EngineError: the device shares the host's memory, gives none, or is lost.
    """
    if device.shares_memory:
        raise EngineError(f"{device.name} shares the host's memory: nothing is copied to it")
    with device.current():
        pinned = device.pinned(num_bytes, np.dtype(np.uint8))
        pinned.view((num_bytes,))[:] = np.random.default_rng(0).integers(
            0, 256, num_bytes, np.uint8
        )
        mirror, stream = device.mirror(pinned), device.stream()
        began, ended = device.event(), device.event()
        calls_s, copies_ms = [], []
        for _ in range(1 + NUM_COPIES):
            stream.record(began)
            called = perf_counter()
            stream.upload(mirror, pinned, num_bytes)
            calls_s.append(perf_counter() - called)
            stream.record(ended)
            ended.synchronize()
            copies_ms.append(ended.elapsed_ms(began))
    return CopySpeed(num_bytes, num_bytes / min(copies_ms[1:]) / 1e6, min(calls_s[1:]) * 1e6)
