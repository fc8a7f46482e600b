"""The page a device author reads: the calls that the pipeline makes of a device.

`host` implements them on CPU threads, `cuda_core` and `pycuda` on an NVIDIA GPU.

- Order is explicit: work on one stream runs in the order it was submitted, an event marks a point
  of that order, `Stream.wait` orders two streams, and nothing else orders anything.
- Memory, streams and events are made at set-up only and live until `Device.close`. `Device.usage`
  counts them, so that a test sees it when serving makes more. Graphs are made while requests run
  (`runtime/graphs.py` says when) and live until they or their device are closed.
- Any thread may call. It enters `Device.current()` first, which makes the device the thread's own
  and puts back what was before.
- A device belongs to the process that opened it. In a forked child nothing of it works; whoever
  owns it refuses there (see `Streams.check`), and `close` does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...arrays import Array, DeviceArray

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """What a device has made and not freed.

    Attributes:
        pinned_bytes: host memory that the device reaches; ordinary memory on the host device.
        device_bytes: memory of the device itself; 0 where host and device share.
        num_streams, num_events: borrowed streams do not count.
        num_graphs: captured and not closed.
    """

    pinned_bytes: int = 0
    device_bytes: int = 0
    num_streams: int = 0
    num_events: int = 0
    num_graphs: int = 0


class PinnedBuffer(Protocol):
    """Host memory that the device can reach without a further copy; owned by its device."""

    def view(self, shape: tuple[int, ...]) -> Array:
        """Return the first elements as a C-contiguous host array of `shape`; no copy."""
        ...


class DeviceBuffer(Protocol):
    """Memory where engines run; owned by its device."""

    def view(self, shape: tuple[int, ...]) -> Array:
        """Return the first elements as an array of `shape` that engines of this device take.

        A NumPy array on the host, a `DeviceArray` on a GPU.
        """
        ...


class Event(Protocol):
    """A point in a stream's order. It may be recorded again once it was waited for.

    An event that was never recorded counts as passed.
    """

    def synchronize(self) -> None:
        """Block until the stream has passed the point where it was recorded last.

        Raises:
            Exception: what work before it on its stream raised since the last recorded event.
        """
        ...

    def elapsed_ms(self, since: Event) -> float:
        """Return the milliseconds from `since` to this event, both passed."""
        ...


class Stream(Protocol):
    """Work in order. Engines need no more of it than `handle` and `submit`."""

    @property
    def handle(self) -> int:
        """The device's own stream (a `cudaStream_t`) as an int; 0 on the host."""
        ...

    def submit(self, work: Callable[[], None]) -> None:
        """Run host `work` in the stream's order; returns at once.

        Raises:
            EngineError: a GPU's stream takes no host work.
        """
        ...

    def upload(self, target: DeviceBuffer, source: PinnedBuffer, num_elements: int) -> None:
        """Copy the first elements of `source` to the device, in the stream's order."""
        ...

    def download(self, target: PinnedBuffer, source: DeviceBuffer, num_elements: int) -> None:
        """Copy the first elements of `source` to the host, in the stream's order."""
        ...

    def record(self, event: Event) -> None:
        """Mark this point of the stream with `event`."""
        ...

    def wait(self, event: Event) -> None:
        """Let later work wait for `event` as recorded last, and fail if it failed.

        Returns at once.
        """
        ...


class Graph(Protocol):
    """Captured work, ready to run again on the same buffers; owned by its device.

    What the work uses besides (an engine's scratch memory) must live as long.
    """

    def launch(self, stream: Stream) -> None:
        """Run the captured work in the order of `stream`; returns at once."""
        ...

    def close(self) -> None:
        """Free it, once no stream runs it any more. Calling it twice is allowed."""
        ...


class Kernel(Protocol):
    """One function of a loaded module."""

    def launch(
        self,
        stream: Stream,
        *,
        grid: Grid,
        block: Grid,
        shared_bytes: int,
        arguments: Sequence[np.generic],
    ) -> None:
        """Run it in the order of `stream`; returns at once.

        Args:
            grid: blocks in x, y, z.
            block: threads of a block in x, y, z.
            shared_bytes: dynamic shared memory of a block.
            arguments: NumPy scalars in the kernel's order and of its types: `np.uint64` for an
                address, `np.int32`, `np.float32`, ...; a tensor map is an `np.void` of 128 bytes.

        Raises:
            EngineError: a tensor map, where this device passes none.
        """
        ...


class Module(Protocol):
    """Device code compiled ahead of time, loaded until the device is closed."""

    def kernel(self, symbol: str, shared_bytes: int = 0) -> Kernel:
        """Return the function `symbol`. Look it up once, not while requests run.

        Args:
            shared_bytes: the most dynamic shared memory that a launch will ask for.

        Raises:
            EngineError: the module has no such function, or the GPU not so much memory.
        """
        ...


class Device(Protocol):
    """Where engines run. Allocation happens at set-up only, never while requests run."""

    @property
    def name(self) -> str:
        """What results call it: `host`, `NVIDIA H200`."""
        ...

    @property
    def shares_memory(self) -> bool:
        """Whether engines read host memory: then nothing is copied, and one stream is enough."""
        ...

    @property
    def offers_graphs(self) -> bool:
        """Whether `capture` can work here at all."""
        ...

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """Major and minor of a GPU, which chooses its kernels; None where none run."""
        ...

    @property
    def num_processors(self) -> int:
        """How many multiprocessors a GPU has; 0 where no kernels run."""
        ...

    def current(self) -> AbstractContextManager[object]:
        """Return a `with` block in which this thread's calls go to this device."""
        ...

    def pinned(self, num_elements: int, dtype: np.dtype[Any]) -> PinnedBuffer:
        """Allocate host memory, page-aligned; its values are undefined."""
        ...

    def mirror(self, pinned: PinnedBuffer) -> DeviceBuffer:
        """Return device memory of the same size; the same memory where host and device share."""
        ...

    def memory(self, num_elements: int, dtype: np.dtype[Any]) -> DeviceBuffer:
        """Allocate memory where engines run; its values are undefined.

        Raises:
            EngineError: there is not so much.
        """
        ...

    def free_bytes(self) -> int:
        """Return how many bytes `memory` could give now; others may take them first."""
        ...

    def sibling(self) -> Device:
        """Open the same device once more: what it makes is freed when it is closed by itself."""
        ...

    def stream(self) -> Stream:
        """Return a new stream that no default stream of anybody waits for."""
        ...

    def borrow(self, stream: object) -> Stream:
        """Return the caller's own stream as one of ours; it stays the caller's.

        Args:
            stream: what has `__cuda_stream__` (torch, cupy, cuda.core) or a `handle` (pycuda), on
                this device. It must live as long as the device is used.

        Raises:
            EngineError: it is no stream, or this device has none to lend.
        """
        ...

    def event(self) -> Event:
        """Return a new event that also takes the time."""
        ...

    def capture(self, work: Callable[[Stream], None], stream: Stream) -> Graph:
        """Record what `work` submits to the stream it is given, without running it.

        Run the same work once before on `stream`: what is allocated or compiled at first use
        cannot be captured, and an engine keeps its state by the stream's handle.

        Args:
            work: gets a stream with the handle of `stream`, and may submit to that one only.
            stream: whose order is recorded. What anybody else submits to it meanwhile would be
                recorded as well, so nobody may; what was submitted before still runs.

        Raises:
            EngineError: this device offers no graphs (it says why), or the work cannot be one;
                `stream` takes work as before.
        """
        ...

    def load_module(self, code: bytes) -> Module:
        """Load device code (a cubin of this GPU's architecture).

        Raises:
            EngineError: this device runs no device code, or not this.
        """
        ...

    def tensor_map(
        self,
        array: DeviceArray,
        block: tuple[int, ...],
        *,
        row_stride: int,
        swizzle: int,
        element: int,
    ) -> np.void:
        """Encode how kernels copy blocks of an array: 128 bytes, a kernel's argument.

        Nothing is read or written: it may be made while a graph is captured. Outside the array
        copies read zeros and write nothing.

        Args:
            array: [rows, columns], on 16 bytes.
            block: rows and columns of one copy.
            row_stride: elements from one row to the next, a multiple of 16 bytes.
            swizzle, element: the driver's numbers, as the manifest of kernels has them.

        Raises:
            EngineError: this device has no tensor maps, or the driver refuses this one.
        """
        ...

    def fault(self) -> str | None:
        """Return why nothing can run here any more, None while it can; never blocks.

        A GPU's context that met an illegal address stays broken until the process ends.
        """
        ...

    def usage(self) -> DeviceUsage:
        """Return what was made and not freed."""
        ...

    def close(self) -> None:
        """Finish the streams and free the memory. Calling it twice is allowed."""
        ...
