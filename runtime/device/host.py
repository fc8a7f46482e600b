"""The host as a device: worker threads as streams, plain arrays as memory, nothing to copy."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import EngineError
from . import protocol

Work = Callable[[], None]
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


class HostEvent:
    """A place in a host stream, with the time and the error it was passed with."""

    def __init__(self) -> None:
        self._passed = threading.Event()
        self.error: BaseException | None = None
        self.time_s = 0.0

    def arm(self) -> None:
        """Forget the last passing: the event is about to be recorded again."""
        self._passed.clear()
        self.error = None

    def fire(self, error: BaseException | None) -> None:
        """Pass the event now, on the stream's worker."""
        self.error = error
        self.time_s = time.perf_counter()
        self._passed.set()

    def block(self) -> None:
        """Wait until the event was passed, with an error or without."""
        self._passed.wait()

    def synchronize(self) -> None:
        self.block()
        if self.error is not None:
            raise self.error

    def elapsed_ms(self, since: protocol.Event) -> float:
        return (self.time_s - _host(since).time_s) * 1e3


@dataclass(frozen=True, slots=True)
class _Wait:
    """A queued item: block the stream until `event` was passed."""

    event: HostEvent


Item = Work | HostEvent | _Wait | None


class HostStream:
    """One worker thread that runs what it is given, in order.

    After a failure the work up to the next recorded event is skipped; that event carries the
    error to whoever waits for it, and the stream goes on.
    """

    handle = 0

    def __init__(self, name: str):
        self._queue: SimpleQueue[Item] = SimpleQueue()
        self._worker = threading.Thread(
            target=_run_worker, args=(self._queue,), name=name, daemon=True
        )
        self._worker.start()
        # The worker holds no reference to the stream: a forgotten stream ends its thread.
        self._end = weakref.finalize(self, self._queue.put, None)

    def submit(self, work: Work) -> None:
        self._queue.put(work)

    def upload(
        self, target: protocol.DeviceBuffer, source: protocol.PinnedBuffer, num_elements: int
    ) -> None:
        """Do nothing: `HostDevice.mirror` gave the same memory."""

    def download(
        self, target: protocol.PinnedBuffer, source: protocol.DeviceBuffer, num_elements: int
    ) -> None:
        """Do nothing: `HostDevice.mirror` gave the same memory."""

    def record(self, event: protocol.Event) -> None:
        _host(event).arm()
        self._queue.put(_host(event))

    def wait(self, event: protocol.Event) -> None:
        self._queue.put(_Wait(_host(event)))

    def close(self) -> None:
        """Run what is queued, then end the worker. Calling it twice is allowed."""
        self._end()
        self._worker.join()


class HostGraph:
    """Work captured from a stream, submitted again at every launch."""

    def __init__(self, captured: list[Work]):
        self._captured = tuple(captured)

    def launch(self, stream: protocol.Stream) -> None:
        for work in self._captured:
            stream.submit(work)


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

    def __init__(self) -> None:
        self._streams: list[HostStream] = []

    def pinned(self, num_elements: int, dtype: np.dtype[Any]) -> HostBuffer:
        return HostBuffer(num_elements, dtype)

    def mirror(self, pinned: protocol.PinnedBuffer) -> protocol.DeviceBuffer:
        return pinned

    def stream(self) -> HostStream:
        stream = HostStream(f"edje-stream-{len(self._streams)}")
        self._streams.append(stream)
        return stream

    def event(self) -> HostEvent:
        return HostEvent()

    def capture(self, work: Callable[[protocol.Stream], None]) -> HostGraph:
        stream = _CapturingStream()
        work(stream)
        return HostGraph(stream.captured)

    def close(self) -> None:
        while self._streams:
            self._streams.pop().close()


def _run_worker(queue: SimpleQueue[Item]) -> None:
    error: BaseException | None = None
    while (item := queue.get()) is not None:
        if isinstance(item, HostEvent):
            item.fire(error)
            error = None
        elif isinstance(item, _Wait):
            item.event.block()
            error = error or item.event.error
        elif error is None:
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
