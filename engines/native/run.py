"""A native engine at work: one `assemble` with the caller's addresses, then one graph.

Activations belong to the engine, at addresses that never change, so that one graph serves every
batch of its size. What differs between batches, `assemble` writes into two words of device memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from threading import Lock
from typing import cast

from ...arrays import Array, DeviceArray, Float32, even_parts
from ...errors import EngineError
from ...kernels.device.contract import Device, Graph, Stream
from ...kernels.launch import KernelLibrary
from ...kernels.tuning import serving_table
from ..contract import Batch, Engine, OpenOptions
from ..manifest import EngineManifest
from .forward import Forward
from .memory import upload
from .plan import Plan, graph_sizes

OWN_GRAPHS = "the engine launches graphs of its own"


class NativeEngine(Engine):
    """The joint encoder in our own kernels, on one GPU.

    Every stream has activations and graphs of its own, made when it is first used: pipelines use
    one each, and warm it up.
    """

    on_device = True

    def __init__(
        self, manifest: EngineManifest, plan: Plan, weights: Mapping[str, Array], device: Device
    ):
        """Send the weights to the GPU and load the kernels.

        Args:
            weights: as `weights.take_weights` names them.
            device: becomes the engine's, and is closed with it.

        Raises:
            EngineError: the GPU has too little memory, or none of the plan's kernels run on it.
        """
        super().__init__(manifest)
        self._plan, self._device = plan, device
        self._runs: dict[int, _StreamRun] = {}
        self._lock = Lock()
        self._closed = False
        capability = capability_of(device)
        self._library = KernelLibrary(device, capability)
        served = serving_table("{}.{}".format(*capability), plan.tiles)
        if served is None:
            raise EngineError(f"{device.name} is not one of {', '.join(plan.tiles)}")
        self._tiles = plan.tiles[served], plan.tiles8.get(served, {})
        with device.current():
            self._weights = upload(device, weights)

    def why_not_capture(self, stream: Stream, bucket: int) -> str | None:
        return OWN_GRAPHS

    def _enqueue(self, batch: Batch, scores: Float32, stream: Stream) -> None:
        run = self._runs.get(stream.handle) or self._new_run(stream)
        for pairs in even_parts(len(batch), self._plan.max_pairs):
            run.enqueue(batch.part(pairs), cast(DeviceArray, scores[pairs]))

    def _new_run(self, stream: Stream) -> _StreamRun:
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed")
            if stream.handle not in self._runs:
                with self._device.current():
                    forward = Forward(
                        self._device, self._library, self._plan, self._weights, self._tiles
                    )
                    self._runs[stream.handle] = _StreamRun(self._device, forward, stream)
            return self._runs[stream.handle]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._runs.clear()
            self._device.close()


class _StreamRun:
    """One stream's activations, and a graph for every bucket and size."""

    def __init__(self, device: Device, forward: Forward, stream: Stream):
        """Capture every graph; each bucket runs once before, so that its kernels are loaded."""
        plan = forward.plan
        self._forward, self._stream = forward, device.borrow(stream)
        self._sizes = graph_sizes(plan.max_pairs)
        self._graphs: dict[tuple[int, int], Graph] = {}
        for bucket in plan.text_buckets:
            forward.enqueue(bucket, self._sizes[0], self._stream)
            for size in self._sizes:
                work = partial(forward.enqueue, bucket, size)
                self._graphs[bucket, size] = device.capture(work, self._stream)

    def enqueue(self, batch: Batch, scores: DeviceArray) -> None:
        """Run one batch of at most `max_pairs` pairs; returns at once."""
        bucket, num_pairs = batch.text_ids.shape[1], len(batch)
        size = next(size for size in self._sizes if size >= num_pairs)
        self._forward.assemble(batch, scores, self._stream)
        self._graphs[bucket, size].launch(self._stream)


def capability_of(device: Device) -> tuple[int, int]:
    """Return the compute capability of a GPU.

    Raises:
        EngineError: the device has none.
    """
    if device.compute_capability is None:
        raise EngineError(f"the native engine needs a GPU, {device.name} is none")
    return device.compute_capability


def raise_setting_faults(options: OpenOptions) -> None:
    """Refuse what this backend does not have: settings and CPU threads (all named)."""
    faults = [f"{name}: unknown setting" for name in options.backend_settings]
    if options.num_threads is not None:
        faults.append(f"num_threads: got {options.num_threads}, a GPU engine has no CPU threads")
    if faults:
        raise EngineError("native cannot be opened so", faults=faults)
