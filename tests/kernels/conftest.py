"""What runs kernels: the interpreter by itself, with `-m gpu` a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edje.kernels.device.cuda_core import CudaCoreDevice
from edje.kernels.launch import KernelLibrary
from recording_device import RecordingDevice


class KernelsOn:
    """Copies arrays to a device and, at `finish`, back to where they were."""

    def __init__(self, device: Any):
        """`device` stays the caller's, and current; its memory lives until it is closed."""
        self._device, self.stream = device, device.stream()
        self.library = KernelLibrary(device, device.compute_capability)
        self._copies: list[tuple[np.ndarray, Any, Any]] = []

    def memory(self, array: np.ndarray) -> Any:
        """Return a copy of `array` in device memory."""
        pinned = self._device.pinned(array.size, array.dtype)
        target = self._device.mirror(pinned)
        pinned.view(array.shape)[...] = array
        self.stream.upload(target, pinned, array.size)
        self._copies.append((array, pinned, target))
        return target.view(array.shape)

    def finish(self) -> None:
        """Wait for the work, and copy every array back."""
        event = self._device.event()
        for array, pinned, target in self._copies:
            self.stream.download(pinned, target, array.size)
        self.stream.record(event)
        event.synchronize()
        for array, pinned, _ in self._copies:
            array[...] = pinned.view(array.shape)
        self._copies.clear()


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What runs kernels: `memory(array)`, `library`, `stream`, and `finish()` to see results."""
    if request.param == "gpu":
        opened: Any = CudaCoreDevice()
    else:
        opened = RecordingDevice(None, kernels=request.getfixturevalue("interpreted"))
    with opened.current():
        yield KernelsOn(opened)
    opened.close()
    assert getattr(opened, "races", []) == []


@pytest.fixture
def older_device(interpreted: Any) -> Iterator[Any]:
    """What runs the kernels that load through pointers, as `device` does."""
    opened = RecordingDevice(None, kernels=interpreted)
    opened.compute_capability = (8, 9)
    with opened.current():
        yield KernelsOn(opened)
    opened.close()
    assert opened.races == []
