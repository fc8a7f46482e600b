"""CUDA graphs: forwards of sizes that come again are captured once, then launched as one.

A slot's buffers never move, so a graph belongs to one slot and one batch's sizes. The first time
a slot sees a size, the engine is run plainly. The second time it runs a forward of its own for
this size (the warm call, whose scores count) and that is captured right behind. From then on the
graph is launched. Where there can be no graph the engine is run plainly, as without this file;
the report says how often, and why.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from ..arrays import Float32
from ..engines.contract import Batch, Engine
from ..errors import EdjeError
from ..kernels.device.contract import Device, Graph, Stream

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

FIRST = "the size came for the first time"
WARM = "the size came for the second time: run, then captured"
LARGE = f"more than {MOST_PAIRS} pairs: a graph would save nothing"
FULL = f"the slot has {MOST_GRAPHS} graphs, all of them in use"

Sizes = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class GraphReport:
    """What became of one engine's batches.

    Attributes:
        captured: graphs made; stands still once every size in use has its own.
        dropped: graphs freed again, for others or because their launch failed.
        launched: batches that a graph ran.
        plain: reason -> batches that the engine ran without one.
        failed: why a size gets no graph any more, for each that failed in some slot.
    """

    captured: int
    dropped: int
    launched: int
    plain: Mapping[str, int]
    failed: tuple[str, ...] = ()


@dataclass(slots=True)
class _Kept:
    """A graph, the forward whose state it uses, and the slot's batch that used it last."""

    graph: Graph
    forward: Callable[[Stream], None]
    last_used: int


class SlotGraphs:
    """Runs the batches of one slot, by graphs where it can.

    Graphs live until they are dropped or their device is closed.
    """

    def __init__(self, engine: Engine, device: Device):
        """Make none yet; engine and device stay the caller's.

        Nobody else submits to the stream while it is captured.
        """
        self._engine = engine
        self._device = device
        self._num_batches = 0
        # The least recently used first.
        self._kept: OrderedDict[Sizes, _Kept] = OrderedDict()
        self._seen: OrderedDict[Sizes, None] = OrderedDict()
        self._failed: dict[Sizes, str] = {}
        self._plain: Counter[str] = Counter()
        self._captured = self._dropped = self._launched = 0

    def enqueue(self, batch: Batch, scores: Float32, *, stream: Stream) -> None:
        """Run one forward in the order of `stream`, as `Engine.enqueue` does; returns at once.

        One call at a time, and nobody else submits to `stream` meanwhile: `Streams` sees to it.

        Args:
            batch, scores: of the same sizes always the same arrays.

        Raises:
            EngineError: the engine refuses the batch.
            Exception: a graph's launch failed; this slot runs this size plainly from then on.
        """
        self._num_batches += 1
        num_queries, bucket = batch.text_ids.shape
        sizes = num_queries, bucket, len(batch)
        kept = self._kept.get(sizes)
        if kept is not None:
            self._launch(sizes, kept, stream)
            return
        why_not = self._why_not(sizes) or self._engine.why_not_capture(stream, bucket)
        if why_not is None:
            why_not = self._capture(sizes, batch, scores, stream)
        if why_not is not None:
            self._plain[why_not] += 1
            self._engine.enqueue(batch, scores, stream=stream)

    def report(self) -> GraphReport:
        """Return what became of the slot's batches so far; any thread may ask."""
        return GraphReport(
            self._captured,
            self._dropped,
            self._launched,
            dict(self._plain),
            tuple(self._failed.values()),
        )

    def _why_not(self, sizes: Sizes) -> str | None:
        """Return why a batch of `sizes` is not captured now, None where it shall be."""
        if sizes[2] > MOST_PAIRS:
            return LARGE
        if sizes in self._failed:
            return self._failed[sizes]
        if len(self._failed) >= MOST_FAILURES:
            return next(reversed(self._failed.values()))
        if sizes not in self._seen:
            self._seen[sizes] = None
            if len(self._seen) > MOST_SEEN:
                self._seen.popitem(last=False)
            return FIRST
        return None if self._has_room() else FULL

    def _has_room(self) -> bool:
        """Return whether one more graph fits, perhaps instead of one that idles."""
        if len(self._kept) < MOST_GRAPHS:
            return True
        oldest = next(iter(self._kept.values()))
        return self._num_batches - oldest.last_used > IDLE_BATCHES

    def _launch(self, sizes: Sizes, kept: _Kept, stream: Stream) -> None:
        kept.last_used = self._num_batches
        self._kept.move_to_end(sizes)
        try:
            kept.graph.launch(stream)
        except Exception as error:
            self._failed[sizes] = f"a launch failed: {_reason(error)}"
            self._drop(sizes)
            raise
        self._launched += 1

    def _capture(self, sizes: Sizes, batch: Batch, scores: Float32, stream: Stream) -> str | None:
        """Run the batch and capture the same forward; return why the batch still has to be run.

        Right behind, for TensorRT prepares a change of sizes in the first forward after it. And
        so the batch has its scores whatever becomes of the capture.
        """
        if len(self._kept) >= MOST_GRAPHS:
            self._drop(next(iter(self._kept)))
        try:
            forward = self._engine.capturable(batch, scores, stream)
            forward(stream)
        except Exception as error:
            self._failed[sizes] = f"no forward to capture: {_reason(error)}"
            return self._failed[sizes]
        self._plain[WARM] += 1
        try:
            graph = self._device.capture(forward, stream)
        except Exception as error:
            self._failed[sizes] = f"a capture failed: {_reason(error)}"
            return None
        self._kept[sizes] = _Kept(graph, forward, self._num_batches)
        self._captured += 1
        return None

    def _drop(self, sizes: Sizes) -> None:
        """Free a graph whose last batch was collected, so that no stream runs it."""
        kept = self._kept.pop(sizes)
        self._dropped += 1
        with suppress(Exception):  # its device may be lost
            kept.graph.close()


def total(reports: Iterable[GraphReport]) -> GraphReport:
    """Return what became of the batches of several slots."""
    captured = dropped = launched = 0
    plain: Counter[str] = Counter()
    failed: tuple[str, ...] = ()
    for report in reports:
        captured += report.captured
        dropped += report.dropped
        launched += report.launched
        plain.update(report.plain)
        failed += report.failed
    return GraphReport(captured, dropped, launched, dict(plain), failed)


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, EdjeError) else f"{type(error).__name__}: {error}"
