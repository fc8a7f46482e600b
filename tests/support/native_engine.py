"""Native engines on a pretended GPU whose kernels run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edje.arrays import DeviceArray
from edje.engines.contract import INPUTS, Batch
from edje.engines.manifest import EngineManifest
from edje.engines.native.plan import Plan
from edje.engines.native.run import NativeEngine
from edje.engines.native.weights import read_weights
from recording_device import RecordingDevice


@contextmanager
def opened(
    folder: Path, kernels: Any, *, capability: tuple[int, int] = (9, 0), **changed: Any
) -> Iterator[tuple[NativeEngine, RecordingDevice]]:
    """Open an engine folder on a new device; `changed` are fields of its plan."""
    device = RecordingDevice(None, kernels=kernels)
    device.compute_capability = capability
    plan = replace(Plan.read(folder), **changed)
    engine = NativeEngine(EngineManifest.read(folder), plan, read_weights(folder), device)
    with device.current():
        yield engine, device
    engine.close()


class HostScorer:
    """Scores batches of host arrays as the pipeline does, through memory made once."""

    def __init__(self, engine: NativeEngine, device: RecordingDevice, max_pairs: int = 64):
        self._engine, self._device = engine, device
        self._stream, self._done = device.stream(), device.event()
        self._scores = device.memory(max_pairs, np.dtype(np.float32))
        self._found = device.pinned(max_pairs, np.dtype(np.float32))

    def score(self, batch: Batch) -> np.ndarray:
        """Return the scores of a batch: float32 [P]."""
        names = (*INPUTS, "visual_scales")
        held = {name: self._sent(getattr(batch, name)) for name in names}
        scores = self._scores.view((len(batch),))
        self._engine.enqueue(Batch(**held), scores, stream=self._stream)
        self._stream.download(self._found, self._scores, len(batch))
        self._stream.record(self._done)
        self._done.synchronize()
        assert not self._device.races, self._device.races
        return self._found.view((len(batch),)).copy()

    def _sent(self, array: np.ndarray | None) -> Any:
        if array is None:
            return None
        pinned = self._device.pinned(array.size, array.dtype)
        target = self._device.mirror(pinned)
        pinned.view(array.shape)[...] = array
        self._stream.upload(target, pinned, array.size)
        view = target.view(array.shape)
        return view
