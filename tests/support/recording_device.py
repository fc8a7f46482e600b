"""A device without hardware: it finishes work in random legal orders and watches every buffer.

Streams are queues of operations. A seeded scheduler runs the head of any stream that may run: a
few after each call, and all that is needed when somebody waits. What may legally happen late thus
happens late, and in every order.

Races are found exactly, not by luck: every operation carries a vector clock (what is certain to
have run before it), and so does the host (what it has waited for). An access that is not ordered
after the last conflicting one is written into `races`, however the scheduler happened to run it.
A graph's launch submits what was captured again, with the same buffers, so both see into graphs.
What clocks cannot see, poison shows: memory starts as NaN (or the least integer), the target of a
pending download is poisoned, and the source of a pending copy must not change.

Gathers and scatters run by their references. With `kernels=` an interpreter, every kernel of ours
runs, as it is written; engines then see device memory by its address only.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np

from edje.arrays import DeviceArray
from edje.errors import EngineError
from edje.kernels.device.contract import DeviceUsage
from launches import VARIANTS, CopyingKernels, Kernels, Launch, tensor_map
from pretended_gpu import name_of
from toy_engine import ToyEngine

HOST = -1
Clock = dict[int, int]


def poison(array: np.ndarray) -> None:
    """Fill with what no sound result holds: the least integer, else NaN (bfloat16 as uint16)."""
    if array.dtype.kind == "i":
        array[...] = np.iinfo(array.dtype).min
    else:
        array[...] = np.frombuffer(b"\xff" * array.itemsize, array.dtype)[0]


def join(clock: Clock, other: Clock) -> None:
    for place, count in other.items():
        clock[place] = max(clock.get(place, 0), count)


@dataclass(slots=True)
class Access:
    """Who touched a buffer: operation `count` of stream `place`."""

    place: int
    count: int
    what: str

    def is_before(self, clock: Clock) -> bool:
        return clock.get(self.place, 0) >= self.count


class DeviceView(np.ndarray):
    """What kernels take: an array that says where it lies."""

    @property
    def address(self) -> int:
        return self.ctypes.data


class RecordingBuffer:
    """Pinned or device memory; remembers the last write and the reads since."""

    def __init__(self, name: str, memory: np.ndarray, *, by_address: bool = False):
        self.name, self.memory, self._by_address = name, memory, by_address
        poison(self.memory)
        self.written: Access | None = None
        self.read: list[Access] = []

    def view(self, shape: tuple[int, ...]) -> Any:
        if self._by_address:
            assert math.prod(shape) <= self.memory.size, f"{shape} of {self.memory.size}"
            return DeviceArray(self.memory.ctypes.data, shape, self.memory.dtype)
        return self.elements(math.prod(shape)).reshape(shape).view(DeviceView)

    def elements(self, count: int) -> np.ndarray:
        return self.memory[:count]

    def holds(self, address: int) -> bool:
        return 0 <= address - self.memory.ctypes.data < self.memory.nbytes

    def unordered(self, clock: Clock, *, writes: bool) -> Iterator[Access]:
        """Accesses that conflict with one of this clock and are not certain to have run."""
        conflicting = [] if self.written is None else [self.written]
        conflicting += self.read if writes else []
        return (access for access in conflicting if not access.is_before(clock))


class Mark:
    """One recording of an event."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.passed = False
        self.error: BaseException | None = None
        self.time = 0


class RecordingEvent:
    def __init__(self, device: RecordingDevice):
        self._device = device
        self.mark: Mark | None = None

    def synchronize(self) -> None:
        self._device.drive_until(self.mark)

    def elapsed_ms(self, since: RecordingEvent) -> float:
        assert self.mark.passed, "the time of an event that was not waited for"
        assert since.mark.passed, "the time of an event that was not waited for"
        return float(self.mark.time - since.mark.time)


@dataclass(slots=True)
class Operation:
    """One item of a stream's queue: work, a mark to pass or a mark to wait for."""

    what: str
    run: Callable[[], None] | None = None
    passes: Mark | None = None
    awaits: Mark | None = None


@dataclass(eq=False)
class RecordingStream:
    device: RecordingDevice
    place: int
    queue: deque[Operation] = field(default_factory=deque)
    clock: Clock = field(default_factory=dict)
    error: BaseException | None = None
    is_captured: bool = False

    @property
    def handle(self) -> int:
        """Another one for every stream, as engines tell them apart by it."""
        return self.place + 1

    def submit(
        self,
        work: Callable[[], None],
        *,
        what: str = "work",
        reads: Sequence[RecordingBuffer] = (),
        writes: Sequence[RecordingBuffer] = (),
    ) -> None:
        with self.device.call(what):
            self._check_not_captured(what)
            self.clock[self.place] = self.clock.get(self.place, 0) + 1
            join(self.clock, self.device.host_clock)
            access = Access(self.place, self.clock[self.place], what)
            self.device.check_order(access.what, self.clock, reads, writes)
            for buffer in writes:
                buffer.written, buffer.read = access, []
            for buffer in reads:
                buffer.read.append(access)
            self.queue.append(Operation(what, work))

    def upload(self, target: RecordingBuffer, source: RecordingBuffer, num_elements: int) -> None:
        self.device.fail_if_asked("upload")
        sent = source.elements(num_elements).tobytes()

        def copy() -> None:
            if source.elements(num_elements).tobytes() != sent:
                self.device.races.append(f"{source.name} changed while its upload was pending")
            target.elements(num_elements)[:] = source.elements(num_elements)
            self.device.fail_if_asked("uploading")

        self.submit(copy, what=f"upload of {source.name}", reads=[source], writes=[target])

    def download(self, target: RecordingBuffer, source: RecordingBuffer, num_elements: int) -> None:
        self.device.fail_if_asked("download")
        poison(target.elements(num_elements))

        def copy() -> None:
            target.elements(num_elements)[:] = source.elements(num_elements)
            self.device.fail_if_asked("downloading")

        self.submit(copy, what=f"download of {source.name}", reads=[source], writes=[target])

    def record(self, event: RecordingEvent) -> None:
        with self.device.call("record"):
            self._check_not_captured("record")
            event.mark = Mark(dict(self.clock))
            self.queue.append(Operation("record", passes=event.mark))

    def wait(self, event: RecordingEvent) -> None:
        with self.device.call("wait"):
            self._check_not_captured("wait")
            if event.mark is not None:
                join(self.clock, event.mark.clock)
                self.queue.append(Operation("wait", awaits=event.mark))

    def _check_not_captured(self, what: str) -> None:
        if self.is_captured:
            self.device.races.append(f"{what} was swallowed by a capture")

    def may_run(self) -> bool:
        return bool(self.queue) and (self.queue[0].awaits is None or self.queue[0].awaits.passed)

    def run_head(self) -> None:
        """Run one operation; a failure skips the work up to the next mark, which carries it."""
        operation = self.queue.popleft()
        if operation.awaits is not None:
            self.error = self.error or operation.awaits.error
        elif operation.passes is not None:
            mark = operation.passes
            mark.passed, mark.error, mark.time = True, self.error, self.device.num_run
            self.error = None
        elif self.error is None:
            try:
                operation.run()
            except Exception as error:
                self.error = error


class CapturingStream(RecordingStream):
    """Takes down what is submitted, with its buffers; events have no place inside a graph."""

    def __init__(self, stream: RecordingStream):
        super().__init__(stream.device, stream.place)
        self.captured: list[tuple[Callable[[], None], dict[str, Any]]] = []

    def submit(self, work: Callable[[], None], **known: Any) -> None:
        self.captured.append((work, known))

    def record(self, event: RecordingEvent) -> None:
        raise EngineError("an event cannot be recorded while a graph is captured")

    wait = record


class RecordingGraph:
    """Submits its work again at every launch; knows whether it may be freed."""

    def __init__(self, device: RecordingDevice, captured: Any):
        self._device = device
        self._captured = captured
        self._launched: Access | None = None
        device.graphs.add(self)

    def launch(self, stream: RecordingStream) -> None:
        assert self in self._device.graphs, "a graph was launched after it was closed"
        self._device.fail_if_asked("launch")
        for work, known in self._captured:
            stream.submit(self._failing(work), **known)
        self._device.num_graph_launches += 1
        self._launched = Access(stream.place, stream.clock[stream.place], "a launch")

    def close(self) -> None:
        if self._launched is not None and not self._launched.is_before(self._device.host_clock):
            self._device.races.append("a graph was freed that may still run")
        self._device.graphs.discard(self)

    def _failing(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            self._device.fail_if_asked("launching")
            work()

        return run


class RecordingDevice:
    """See the module. `seed` decides the order; `races` must stay empty."""

    name = "recording"
    shares_memory = False
    compute_capability = (9, 0)
    num_processors = 4
    offers_graphs = True

    def __init__(self, seed: int | None, *, kernels: Kernels | None = None):
        """Open a device.

        Args:
            seed: of the order; None runs everything at once, in the order of the calls.
            kernels: what runs launches.
        """
        self._random = None if seed is None else Random(seed)
        self._kernels = kernels or CopyingKernels()
        self.loaded: list[bytes] = []
        self.launches: list[Launch] = []
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._streams: list[RecordingStream] = []
        self._buffers: list[RecordingBuffer] = []
        self._num_events = 0
        self.graphs: set[RecordingGraph] = set()
        self.host_clock: Clock = {}
        self.races: list[str] = []
        self.lost: str | None = None
        self.lose_after: int | None = None  # operations
        self.failures: dict[str, int] = {}
        self.num_run = 0
        self.num_graph_launches = 0
        self.closed = False

    @contextmanager
    def current(self) -> Iterator[None]:
        depth = getattr(self._thread, "depth", 0)
        self._thread.depth = depth + 1
        try:
            yield
        finally:
            self._thread.depth = depth

    def depth(self) -> int:
        """How many times this thread has made the device current."""
        return getattr(self._thread, "depth", 0)

    def pinned(self, num_elements: int, dtype: np.dtype[Any]) -> RecordingBuffer:
        return self._buffer(f"pinned {len(self._buffers)}", num_elements, dtype, False)

    def mirror(self, pinned: RecordingBuffer) -> RecordingBuffer:
        size, dtype = pinned.memory.size, pinned.memory.dtype
        return self._buffer(f"mirror of {pinned.name}", size, dtype, self._kernels.by_address)

    def memory(self, num_elements: int, dtype: np.dtype[Any]) -> RecordingBuffer:
        name = f"memory {len(self._buffers)}"
        return self._buffer(name, num_elements, dtype, self._kernels.by_address)

    def tensor_map(
        self,
        array: Any,
        block: tuple[int, ...],
        *,
        swizzle: int = 0,
        element: int = 0,
        row_stride: int | None = None,
    ) -> np.void:
        """Return `launches.tensor_map` of it; what it tells of must lie in one buffer."""
        stride = array.shape[1] if row_stride is None else row_stride
        num_elements = (array.shape[0] - 1) * stride + array.shape[1]
        last = array.address + num_elements * array.dtype.itemsize - 1
        for buffer in self.buffers_at([array.address]):  # none for memory that does not exist
            assert buffer.holds(last), f"a tensor map reaches past {buffer.name}"
        more = {"swizzle": swizzle, "element": element, "row_stride": row_stride}
        return tensor_map(array, block, **more)

    def free_bytes(self) -> int:
        return 1 << 20

    def sibling(self) -> RecordingSibling:
        return RecordingSibling(self)

    def stream(self) -> RecordingStream:
        self._streams.append(RecordingStream(self, len(self._streams)))
        return self._streams[-1]

    def borrow(self, stream: object) -> RecordingStream:
        assert isinstance(stream, RecordingStream)
        return stream

    def event(self) -> RecordingEvent:
        self._num_events += 1
        return RecordingEvent(self)

    def capture(
        self, work: Callable[[RecordingStream], None], stream: RecordingStream
    ) -> RecordingGraph:
        with self.call("capture"):
            self.fail_if_asked("capture")
        capturing, stream.is_captured = CapturingStream(stream), True
        try:
            work(capturing)
        finally:
            stream.is_captured = False
        return RecordingGraph(self, capturing.captured)

    def load_module(self, code: bytes) -> RecordingModule:
        name = name_of(code)
        assert name is not None, "not one of our cubins"
        self.loaded.append(code)
        return RecordingModule(self, name)

    def fault(self) -> str | None:
        return self.lost

    def usage(self) -> DeviceUsage:
        num_bytes = {False: 0, True: 0}
        for buffer in self._buffers:
            num_bytes[buffer.name.startswith("pinned")] += buffer.memory.nbytes
        made = len(self._streams), self._num_events, len(self.graphs)
        return DeviceUsage(num_bytes[True], num_bytes[False], *made)

    def close(self) -> None:
        """Run what is queued."""
        with self._lock:
            while self._run_one():
                pass
            self.closed = True

    def is_idle(self) -> bool:
        """Whether nothing is queued."""
        return not any(stream.queue for stream in self._streams)

    def is_capturing(self) -> bool:
        """Whether a capture is open."""
        return any(stream.is_captured for stream in self._streams)

    def buffers_of(self, *arrays: Any) -> list[RecordingBuffer]:
        """Return the buffers that these views lie in."""
        given = (array for array in arrays if array is not None)
        return self.buffers_at(
            array.address if isinstance(array, DeviceArray) else array.ctypes.data
            for array in given
        )

    def buffers_at(self, addresses: Iterable[int]) -> list[RecordingBuffer]:
        """Return the buffers that these addresses lie in."""
        wanted = list(addresses)
        return [buffer for buffer in self._buffers if any(map(buffer.holds, wanted))]

    def work_of(self, launch: Launch) -> Callable[[], None]:
        """Return what runs a launch; what it may not do is noted where races are."""
        work = self._kernels.work(launch.name, launch.grid, launch.arguments)

        def run() -> None:
            try:
                work()
            except AssertionError as wrong:
                self.races.append(str(wrong))
                raise

        return run

    def touch(self, *arrays: Any, writes: bool) -> None:
        """Say that the host reads (or writes as well) these views now."""
        with self._lock:
            touched = self.buffers_of(*arrays)
            reads, written = ([], touched) if writes else (touched, [])
            self.check_order("the host", self.host_clock, reads, written)

    def check_order(
        self,
        what: str,
        clock: Clock,
        reads: Sequence[RecordingBuffer],
        writes: Sequence[RecordingBuffer],
    ) -> None:
        """Note every access that is not ordered after what it conflicts with."""
        for buffers, is_write in ((reads, False), (writes, True)):
            for buffer in buffers:
                for other in buffer.unordered(clock, writes=is_write):
                    verb = "writes" if is_write else "reads"
                    self.races.append(f"{what} {verb} {buffer.name}, unordered to {other.what}")

    @contextmanager
    def call(self, what: str) -> Iterator[None]:
        """One call of the host: checked, locked, followed by a little progress."""
        if getattr(self._thread, "depth", 0) == 0:
            self.races.append(f"{what} was called where the device is not current")
        if self.lost is not None:
            raise RuntimeError(self.lost)
        with self._lock:
            yield
            if self._random is None:
                while self._run_one():
                    pass
            else:
                for _ in range(self._random.choice((0, 0, 1, 3))):
                    self._run_one()

    def drive_until(self, mark: Mark | None) -> None:
        """Run in random order until `mark` is passed; raise what it carries."""
        if mark is None:
            return
        with self.call("synchronize"):
            while not mark.passed:
                assert self._run_one(), "the streams wait for each other"
            join(self.host_clock, mark.clock)
        if mark.error is not None:
            raise mark.error

    def fail_if_asked(self, what: str) -> None:
        """Fail at the n-th call of `what`, as `failures` says."""
        if what in self.failures:
            self.failures[what] -= 1
            if self.failures[what] == 0:
                raise RuntimeError(f"{what} broke")

    def _buffer(
        self, name: str, num_elements: int, dtype: np.dtype[Any], by_address: bool
    ) -> RecordingBuffer:
        memory = self._kernels.memory(num_elements, dtype, name)
        self._buffers.append(RecordingBuffer(name, memory, by_address=by_address))
        return self._buffers[-1]

    def _run_one(self) -> bool:
        if self.lose_after is not None and self.num_run >= self.lose_after:
            self.lost = "an illegal memory access was encountered"
        ready = [stream for stream in self._streams if stream.may_run()]
        if not ready:
            return False
        self.num_run += 1
        (ready[0] if self._random is None else self._random.choice(ready)).run_head()
        return True


class RecordingSibling:
    """The same device once more; what it makes goes with it."""

    def __init__(self, device: RecordingDevice):
        self._device, self._before = device, len(device._buffers)
        self._num_events = device._num_events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def close(self) -> None:
        assert self._device.is_idle(), "it is still in use"
        del self._device._buffers[self._before :]
        self._device._num_events = self._num_events


@dataclass(frozen=True)
class RecordingModule:
    """A cubin of a kernel of ours, and the kernel."""

    device: RecordingDevice
    name: str

    def kernel(self, symbol: str, shared_bytes: int = 0) -> RecordingModule:
        assert symbol == VARIANTS[self.name].function
        return self

    def launch(
        self, stream: RecordingStream, *, arguments: Sequence[np.generic], **how: Any
    ) -> None:
        self.device.fail_if_asked("launch")
        symbol = VARIANTS[self.name].function
        launch = Launch(self.name, symbol, stream, arguments=tuple(arguments), **how)
        self.device.launches.append(launch)
        stream.submit(
            self.device.work_of(launch),
            what=symbol,
            reads=self.device.buffers_at(launch.addresses(written=False)),
            writes=self.device.buffers_at(launch.addresses(written=True)),
        )


class WatchedEngine(ToyEngine):
    """The toy engine, saying which buffers its work reads and writes; poisons its output first."""

    def _enqueue(self, batch: Any, scores: np.ndarray, stream: Any) -> None:
        if not isinstance(stream, RecordingStream):
            super()._enqueue(batch, scores, stream)
            return

        def work() -> None:
            poison(scores)
            self._run(batch, scores)

        inputs = [batch.text_ids, batch.text_length, batch.query_of_pair, batch.visual_tokens]
        inputs += [batch.visual_scales, batch.rows, *(batch.fresh or ())]
        buffers = stream.device.buffers_of
        reads, writes = buffers(*inputs), buffers(scores)
        stream.submit(work, what="the engine", reads=reads, writes=writes)


class CapturableEngine(WatchedEngine):
    """The watched engine as TensorRT is: a captured forward must be warm, and is captured once."""

    def why_not_capture(self, stream: Any, bucket: int) -> str | None:
        return None

    def capturable(self, batch: Any, scores: np.ndarray, stream: Any) -> Callable[[Any], None]:
        runs: list[bool] = []

        def forward(on: Any) -> None:
            runs.append(isinstance(on, CapturingStream))
            assert runs in ([False], [False, True]), "captured cold, or twice"
            assert on.place == stream.place, "captured on another stream"
            self.enqueue(batch, scores, stream=on)

        return forward


class RowReadingEngine(CapturableEngine):
    """The capturable engine as the native one is: it finds tokens by row."""

    reads_rows = True

    def _run(self, batch: Any, scores: np.ndarray) -> None:
        if batch.rows is not None:
            held = batch.visual_tokens, batch.visual_scales
            tokens, scales = (
                None if each is None else np.concatenate([each, more])[batch.rows]
                for each, more in zip(held, batch.fresh, strict=True)
            )
            batch = replace(batch, visual_tokens=tokens, visual_scales=scales, rows=None)
        super()._run(batch, scores)
