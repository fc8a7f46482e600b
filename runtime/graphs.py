"""CUDA graphs: forwards of sizes that come again are captured once, then launched as one.

A slot's buffers never move, so a graph belongs to one slot and one batch's sizes. The first time
a slot sees a size, the engine is run plainly. The second time it runs a forward of its own for
this size (the warm call, whose scores count) and that is captured right behind. From then on the
graph is launched. Where there can be no graph the engine is run plainly, as without this file;
`Graphs.report` says how often, and why.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from ..arrays import Float32
from ..engines.contract import Batch, Engine
from ..errors import EdjeError
from ..kernels.device.contract import Device, Graph, Stream
from .batcher import PlannedBatch
from .slot import Slot

# A launch saves about a hundred launches of kernels, together less than half a millisecond of the
# calling thread. From some hundred pairs of a full-size scorer on, the GPU computes longer than
# that even at 1 PFLOP/s (3.5 GFLOP a pair), and they hide behind the batch before.
MOST_PAIRS = 256
# A slot's graphs: some sizes in each text bucket. A graph holds a few hundred kB of the GPU's
# memory, and an engine's context holds some MB for each.
MOST_GRAPHS = 16
# A graph is only dropped once it idled for so many batches of its slot: capturing costs about
# what ten launches save, so sizes that take turns in the cache would make it a loss.
IDLE_BATCHES = 256
MOST_SEEN = 64  # sizes seen once that a slot remembers: who comes later did not come again
MOST_FAILURES = 4  # of one slot; then it captures no more, whatever the size

_FIRST = "the size came for the first time"
_WARM = "the size came for the second time: run, then captured"
_LARGE = f"more than {MOST_PAIRS} pairs: a graph would save nothing"
_FULL = f"the slot has {MOST_GRAPHS} graphs, all of them in use"

Sizes = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class GraphReport:
    """What became of one engine's batches.

    Attributes:
        captured: graphs made; stands still once every size in use has its own.
        dropped: graphs freed again, for others or because their launch failed.
        launched: batches that a graph ran.
        plain: reason -> batches that the engine ran without one.
    """

    captured: int
    dropped: int
    launched: int
    plain: Mapping[str, int]


@dataclass(slots=True)
class _Kept:
    """A graph, the forward whose state it uses, and the slot's batch that used it last."""

    graph: Graph
    forward: Callable[[Stream], None]
    last_used: int


@dataclass(slots=True)
class _SlotGraphs:
    """One slot's graphs, the least recently used first, and what is known of other sizes."""

    num_batches: int = 0
    kept: OrderedDict[Sizes, _Kept] = field(default_factory=OrderedDict)
    seen: OrderedDict[Sizes, None] = field(default_factory=OrderedDict)
    failed: dict[Sizes, str] = field(default_factory=dict)

    def find(self, sizes: Sizes) -> _Kept | None:
        """Count a batch of `sizes`; return its graph."""
        self.num_batches += 1
        kept = self.kept.get(sizes)
        if kept is not None:
            kept.last_used = self.num_batches
            self.kept.move_to_end(sizes)
        return kept

    def why_not(self, sizes: Sizes) -> str | None:
        """Return why a batch of `sizes` is not captured now, None where it shall be."""
        if sizes[2] > MOST_PAIRS:
            return _LARGE
        if sizes in self.failed:
            return self.failed[sizes]
        if len(self.failed) >= MOST_FAILURES:
            return next(reversed(self.failed.values()))
        if sizes not in self.seen:
            self.seen[sizes] = None
            if len(self.seen) > MOST_SEEN:
                self.seen.popitem(last=False)
            return _FIRST
        return None if self.has_room() else _FULL

    def has_room(self) -> bool:
        """Return whether one more graph fits, perhaps in the place of one that idles."""
        if len(self.kept) < MOST_GRAPHS:
            return True
        oldest = next(iter(self.kept.values()))
        return self.num_batches - oldest.last_used > IDLE_BATCHES


class Graphs:
    """Runs the batches of one engine, by graphs where it can.

    Graphs live until they are dropped or their device is closed.
    """

    def __init__(self, engine: Engine, device: Device, *, wanted: bool, exclusive: bool):
        """Make none yet; engine and device stay the caller's.

        Args:
            wanted: False runs every batch plainly.
            exclusive: nobody else submits to the stream while it is captured.
        """
        self._engine = engine
        self._device = device
        self._never = _why_never(device, wanted=wanted, exclusive=exclusive)
        self._slots: dict[Slot, _SlotGraphs] = {}
        self._plain: Counter[str] = Counter()
        self._captured = self._dropped = self._launched = 0

    def enqueue(self, slot: Slot, planned: PlannedBatch, stream: Stream) -> None:
        """Run one filled slot's forward in the order of `stream`; returns at once.

        One call at a time, and nobody else submits to `stream` meanwhile: `Lane` takes turns.

        Raises:
            EngineError: the engine refuses the batch.
            Exception: a graph's launch failed; this slot runs this size plainly from then on.
        """
        if self._never is not None:
            self._run_plainly(slot, planned, stream, self._never)
            return
        mine = self._slots.get(slot)
        if mine is None:
            mine = self._slots[slot] = _SlotGraphs()
        sizes = len(planned.queries), planned.bucket, len(planned.pairs)
        kept = mine.find(sizes)
        if kept is not None:
            self._launch(mine, sizes, kept.graph, stream)
            return
        why_not = mine.why_not(sizes) or self._engine.why_not_capture(stream, planned.bucket)
        if why_not is None:
            why_not = self._capture(mine, sizes, slot.engine_views(planned), stream)
        if why_not is not None:
            self._run_plainly(slot, planned, stream, why_not)

    def report(self) -> GraphReport:
        """Return what became of the batches so far; any thread may ask."""
        return GraphReport(self._captured, self._dropped, self._launched, dict(self._plain))

    def _run_plainly(self, slot: Slot, planned: PlannedBatch, stream: Stream, why_not: str) -> None:
        self._plain[why_not] += 1
        batch, scores = slot.engine_views(planned)
        self._engine.enqueue(batch, scores, stream=stream)

    def _launch(self, mine: _SlotGraphs, sizes: Sizes, graph: Graph, stream: Stream) -> None:
        try:
            graph.launch(stream)
        except Exception as error:
            mine.failed[sizes] = f"a launch failed: {_reason(error)}"
            self._drop(mine, sizes)
            raise
        self._launched += 1

    def _capture(
        self, mine: _SlotGraphs, sizes: Sizes, views: tuple[Batch, Float32], stream: Stream
    ) -> str | None:
        """Run the batch and capture the same forward; return why the batch still has to be run.

        Right behind, for TensorRT prepares a change of sizes in the first forward after it. And
        so the batch has its scores whatever becomes of the capture.
        """
        if len(mine.kept) >= MOST_GRAPHS:
            self._drop(mine, next(iter(mine.kept)))
        try:
            forward = self._engine.capturable(*views, stream)
            forward(stream)
        except Exception as error:
            mine.failed[sizes] = f"no forward to capture: {_reason(error)}"
            return mine.failed[sizes]
        self._plain[_WARM] += 1
        try:
            graph = self._device.capture(forward, stream)
        except Exception as error:
            mine.failed[sizes] = f"a capture failed: {_reason(error)}"
            return None
        mine.kept[sizes] = _Kept(graph, forward, mine.num_batches)
        self._captured += 1
        return None

    def _drop(self, mine: _SlotGraphs, sizes: Sizes) -> None:
        """Free a graph of a slot whose last batch was collected, so that no stream runs it."""
        kept = mine.kept.pop(sizes)
        self._dropped += 1
        with suppress(Exception):  # its device may be lost
            kept.graph.close()


def _why_never(device: Device, *, wanted: bool, exclusive: bool) -> str | None:
    """Return why no batch on `device` gets a graph, None where some may."""
    if not wanted:
        return "graphs are turned off"
    if device.shares_memory:
        return f"the {device.name} launches no kernels: a graph would save nothing"
    if not device.offers_graphs:
        return f"this library offers no graphs on {device.name}: use the cuda_core device"
    if not exclusive:
        return "the stream is the caller's, whose other work a capture could swallow"
    return None


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, EdjeError) else f"{type(error).__name__}: {error}"
