"""A native engine at work: one `assemble` with the caller's addresses, then one graph.

Activations belong to the engine, at addresses that never change, so that one graph serves every
batch of its size. What differs between batches, `assemble` writes into two words of device memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
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
from .hidden import Model, digests_of, why_not_resume
from .memory import activation_bytes, upload
from .plan import Plan, graph_sizes
from .steps import Choices

OWN_GRAPHS = "the engine launches graphs of its own"


class NativeEngine(Engine):
    """The joint encoder in our own kernels, on one GPU.

    Every stream has activations and graphs of its own, made when it is first used (some tenths of a
    second, so warm up) and kept until the engine is closed: use few. Any thread may call.
    """

    on_device = True
    reads_rows = True

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
        eight, fused = plan.tiles8.get(served, {}), plan.fused.get(served, ())
        self._choices = Choices(plan.tiles[served], eight, fused)
        self._model = Model(plan, self._choices, digests_of(weights))
        self._resumes_at = 0
        with device.current():
            self._weights = upload(device, weights)

    def why_not_capture(self, stream: Stream, bucket: int) -> str | None:
        run = self._runs.get(stream.handle)
        if run is None or not run.num_plain:
            return OWN_GRAPHS
        return f"{OWN_GRAPHS}, but {run.num_plain} sizes could not be captured and run without"

    @property
    def bytes_a_stream(self) -> int:
        return activation_bytes(self._plan)

    def hidden_shape(self, bucket: int) -> tuple[int, int] | None:
        takes_part = self._plan.shallow or self._resumes_at
        return (self._plan.num_slots(bucket), self._plan.width) if takes_part else None

    def why_not_resume(self, first: Engine) -> str | None:
        if not isinstance(first, NativeEngine):
            return f"{first.manifest.words} keeps no hidden states"
        why_not = why_not_resume(first._model, self._model)
        if why_not is None:
            with self._lock:  # what runs already has no graph that begins there
                if self._runs:
                    return "it is running already"
                self._resumes_at = first._plan.num_layers
        return why_not

    def _enqueue(self, batch: Batch, scores: Float32, stream: Stream) -> None:
        run = self._runs.get(stream.handle) or self._new_run(stream)
        for pairs in even_parts(len(batch), self._plan.max_pairs):
            run.enqueue(batch.part(pairs), cast(DeviceArray, scores[pairs]))

    def _new_run(self, stream: Stream) -> _StreamRun:
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed")
            if stream.handle not in self._runs:
                device = self._device.sibling()  # what it makes goes with it, should this fail
                try:
                    with device.current():
                        borrowed = device.borrow(stream)
                        parts = (self._library, self._plan, self._weights, self._choices)
                        forward = Forward(device, *parts, self._resumes_at)
                        run = _StreamRun(device, forward, borrowed)
                except BaseException:
                    device.close()
                    raise
                self._runs[stream.handle] = run
            return self._runs[stream.handle]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for run in self._runs.values():
                run.close()
            self._runs.clear()
            self._device.close()


class _StreamRun:
    """One stream's activations, and a graph for every bucket, size and layer to begin with."""

    def __init__(self, device: Device, forward: Forward, stream: Stream):
        """Capture every graph; each bucket runs once before, so that its kernels are loaded.

        On a stream of its own: nobody else's work is captured with it, and the default stream,
        which cannot be captured at all, may be the caller's.

        Args:
            device: current, owns what `forward` allocated, and becomes this run's.
            stream: the caller's, which the graphs are launched on.
        """
        plan = forward.plan
        self._device, self._forward, self._stream = device, forward, stream
        self._turn = Lock()
        self._sizes = graph_sizes(plan.max_pairs)
        own, warm = device.stream(), device.event()
        for bucket in plan.text_buckets:
            forward.enqueue(bucket, self._sizes[0], own)
        own.record(warm)
        warm.synchronize()
        self._graphs = {
            (bucket, size, first): _captured(device, self._from(bucket, size, first), own)
            for bucket in plan.text_buckets
            for size in self._sizes
            for first in sorted({0, forward.resumes_at})
        }

    @property
    def num_plain(self) -> int:
        """How many sizes have no graph."""
        return sum(graph is None for graph in self._graphs.values())

    def enqueue(self, batch: Batch, scores: DeviceArray) -> None:
        """Run one batch of at most `max_pairs` pairs; returns at once."""
        bucket, num_pairs = batch.text_ids.shape[1], len(batch)
        size = next(size for size in self._sizes if size >= num_pairs)
        forward, stream = self._forward, self._stream
        resumes = batch.hidden is not None and not forward.plan.shallow
        first = forward.resumes_at if resumes else 0
        graph = self._graphs[bucket, size, first]
        with self._turn:  # what `assemble` writes is for the very next graph
            forward.assemble(batch, scores, stream)
            if resumes:  # over the embeddings: lengths and `control` alone are wanted of those
                forward.resume(batch, stream)
            if graph is None:
                self._from(bucket, size, first)(stream)
            else:
                graph.launch(stream)
            if batch.hidden is not None and not resumes:
                forward.keep(batch, stream)

    def _from(self, bucket: int, size: int, first: int) -> Callable[[Stream], None]:
        """Return what runs the layers from `first` on."""
        return partial(self._forward.enqueue, bucket, size, first=first)

    def close(self) -> None:
        """Wait for the GPU, and free everything."""
        self._device.close()


def _captured(device: Device, work: Callable[[Stream], None], stream: Stream) -> Graph | None:
    """Return the graph of `work`, None where it cannot be captured.

    Whoever waits for the whole GPU meanwhile, in any library, breaks a capture: so it is tried
    once more.
    """
    for _ in range(2):
        with suppress(Exception):
            return device.capture(work, stream)
    return None


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
