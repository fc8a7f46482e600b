"""The host as a device: worker threads as streams, plain arrays as memory, nothing to copy."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from ...arrays import DeviceArray
from ...errors import EngineError
from ...machine import available_memory_bytes
from . import contract as protocol

Work = Callable[[], None]
_NOTHING_TO_DO: AbstractContextManager[object] = nullcontext()
ALIGNMENT_BYTES = 4096  # whole pages: what direct reads and pinning want


class HostBuffer:
    """Page-aligned host memory; serves as `PinnedBuffer` and as `DeviceBuffer`."""

    def __init__(self, num_elements: int, dtype: np.dtype[Any]):
        num_bytes = num_elements * dtype.itemsize
        memory = np.zeros(num_bytes + ALIGNMENT_BYTES, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT_BYTES
        self._elements: npt.NDArray[Any] = memory[start : start + num_bytes].view(dtype)

    def view(self, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        return self._elements[: math.prod(shape)].reshape(shape)


class _Mark:
    """One recording of an event: a point in a stream, with the time and the error it met."""

    __slots__ = ("_passed", "error", "time_s")

    def __init__(self) -> None:
        self._passed = threading.Lock()  # held until the stream passes: cheaper than an Event
        self._passed.acquire()
        self.error: BaseException | None = None
        self.time_s = 0.0

    def fire(self, error: BaseException | None) -> None:
        """Pass the point now, on the stream's worker; once."""
        self.error = error
        self.time_s = time.perf_counter()
        self._passed.release()

    def block(self) -> None:
        """Wait until the point was passed, with an error or without."""
        with self._passed:
            pass


class HostEvent:
    """A point in a host stream."""

    def __init__(self) -> None:
        self.mark = _Mark()
        self.mark.fire(None)

    def synchronize(self) -> None:
        mark = self.mark
        mark.block()
        if mark.error is not None:
            raise mark.error

    def elapsed_ms(self, since: protocol.Event) -> float:
        return (self.mark.time_s - _host(since).mark.time_s) * 1e3


@dataclass(frozen=True, slots=True)
class _Wait:
    """A queued item: block the stream until `mark` was passed."""

    mark: _Mark


Item = Work | _Mark | _Wait | None


class HostStream:
    """One worker thread that runs what it is given, in order.

    After a failure the work up to the next recorded event is skipped; that event carries the
    error to whoever waits for it, and the stream goes on.
    """

    handle = 0

    def __init__(self, name: str):
        self._queue: SimpleQueue[Item] = SimpleQueue()
        self._running = threading.Lock()  # held by whoever runs work of this stream
        self._worker = threading.Thread(
            target=_run_worker, args=(self._queue, self._running), name=name, daemon=True
        )
        self._worker.start()
        # The worker holds no reference to the stream: a forgotten stream ends its thread.
        self._end = weakref.finalize(self, self._queue.put, None)

    def submit(self, work: Work) -> None:
        self._queue.put(work)

    def run_here(self, work: Callable[[InlineStream], None]) -> None:
        """Run work at once on the calling thread: nothing else of this stream runs meanwhile.

        For who has nothing queued here and would only wait for the worker; what other threads have
        queued comes before or after it. What the work submits to its stream, it runs itself.

        Raises:
            Exception: what the work raises.
        """
        with self._running:
            work(_INLINE)

    def upload(
        self, target: protocol.DeviceBuffer, source: protocol.PinnedBuffer, num_elements: int
    ) -> None:
        """Do nothing: `HostDevice.mirror` gave the same memory."""

    def download(
        self, target: protocol.PinnedBuffer, source: protocol.DeviceBuffer, num_elements: int
    ) -> None:
        """Do nothing: `HostDevice.mirror` gave the same memory."""

    def record(self, event: protocol.Event) -> None:
        mark = _host(event).mark = _Mark()
        self._queue.put(mark)

    def wait(self, event: protocol.Event) -> None:
        self._queue.put(_Wait(_host(event).mark))

    def close(self) -> None:
        """Run what is queued, then end the worker. Calling it twice is allowed."""
        self._end()
        self._worker.join()


class InlineStream(HostStream):
    """Runs work at once on the calling thread, which gets what it raises: for measuring."""

    def __init__(self) -> None:
        """Start no worker."""

    def submit(self, work: Work) -> None:
        work()

    def run_here(self, work: Callable[[InlineStream], None]) -> None:
        work(self)

    def record(self, event: protocol.Event) -> None:
        mark = _host(event).mark = _Mark()
        mark.fire(None)

    def wait(self, event: protocol.Event) -> None:
        _host(event).synchronize()

    def close(self) -> None:
        """Do nothing: there is no worker."""


_INLINE = InlineStream()


class HostGraph:
    """Work captured from a stream, submitted again at every launch."""

    def __init__(self, captured: list[Work], graphs: set[HostGraph]):
        self._captured = tuple(captured)
        self._graphs = graphs
        graphs.add(self)

    def launch(self, stream: protocol.Stream) -> None:
        for work in self._captured:
            stream.submit(work)

    def close(self) -> None:
        self._graphs.discard(self)
        self._captured = ()


class _CapturingStream(HostStream):
    """Takes work down instead of running it; events have no place inside a graph."""

    def __init__(self) -> None:
        self.captured: list[Work] = []

    def submit(self, work: Work) -> None:
        self.captured.append(work)

    def record(self, event: protocol.Event) -> None:
        raise EngineError("an event cannot be recorded while a graph is captured")

    def wait(self, event: protocol.Event) -> None:
        raise EngineError("an event cannot be waited for while a graph is captured")


class HostDevice:
    """The CPU production path: engines run on worker threads, over the caller's own arrays."""

    name = "host"
    shares_memory = True
    compute_capability = None
    num_processors = 0
    offers_graphs = True

    def __init__(self) -> None:
        self._process = os.getpid()
        self._streams: list[HostStream] = []
        self._graphs: set[HostGraph] = set()
        self._usage = protocol.DeviceUsage()

    def current(self) -> AbstractContextManager[object]:
        return _NOTHING_TO_DO

    def pinned(self, num_elements: int, dtype: np.dtype[Any]) -> HostBuffer:
        pinned_bytes = self._usage.pinned_bytes + num_elements * dtype.itemsize
        self._usage = replace(self._usage, pinned_bytes=pinned_bytes)
        return HostBuffer(num_elements, dtype)

    def mirror(self, pinned: protocol.PinnedBuffer) -> protocol.DeviceBuffer:
        return pinned

    def memory(self, num_elements: int, dtype: np.dtype[Any]) -> HostBuffer:
        return self.pinned(num_elements, dtype)

    def free_bytes(self) -> int:
        return available_memory_bytes()

    def sibling(self) -> HostDevice:
        return HostDevice()

    def stream(self) -> HostStream:
        stream = HostStream(f"edje-stream-{len(self._streams)}")
        self._streams.append(stream)
        return stream

    def borrow(self, stream: object) -> HostStream:
        if not isinstance(stream, HostStream):
            raise EngineError(f"the host device borrows host streams, got {type(stream).__name__}")
        return stream

    def event(self) -> HostEvent:
        self._usage = replace(self._usage, num_events=self._usage.num_events + 1)
        return HostEvent()

    def capture(
        self, work: Callable[[protocol.Stream], None], stream: protocol.Stream
    ) -> HostGraph:
        capturing = _CapturingStream()
        work(capturing)
        return HostGraph(capturing.captured, self._graphs)

    def load_module(self, code: bytes) -> protocol.Module:
        raise EngineError("the host device runs no device code")

    def tensor_map(
        self,
        array: DeviceArray,
        block: tuple[int, ...],
        *,
        row_stride: int,
        swizzle: int,
        element: int,
    ) -> np.void:
        raise EngineError("the host device has no tensor maps")

    def fault(self) -> str | None:
        return None

    def usage(self) -> protocol.DeviceUsage:
        return replace(self._usage, num_streams=len(self._streams), num_graphs=len(self._graphs))

    def close(self) -> None:
        """Finish the streams; in a forked child, which has none of their threads, do nothing."""
        if os.getpid() == self._process:
            while self._streams:
                self._streams.pop().close()
        self._graphs.clear()
        self._usage = protocol.DeviceUsage()


def _run_worker(queue: SimpleQueue[Item], running: threading.Lock) -> None:
    error: BaseException | None = None
    while (item := queue.get()) is not None:
        if isinstance(item, _Mark):
            item.fire(error)
            error = None
        elif isinstance(item, _Wait):
            item.mark.block()
            error = error or item.mark.error
        elif error is None:
            with running:
                error = _run(item)
        item = None  # an idle worker must not keep the last batch alive


def _run(work: Work) -> BaseException | None:
    try:
        work()
    except BaseException as error:  # reaches the caller through the next event
        return error
    return None


def _host(event: protocol.Event) -> HostEvent:
    if not isinstance(event, HostEvent):
        raise EngineError(f"a host stream takes host events, got {type(event).__name__}")
    return event
