"""When a batch is captured, launched or run plainly, and that every choice is told."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from edje.engines.build_options import BuildOptions
from edje.engines.builder.build import build_engine
from edje.engines.builder.options import EngineOptions
from edje.engines.contract import Batch, OpenOptions
from edje.engines.registry import open_engine, require_builder
from edje.errors import EngineError
from edje.kernels.device.host import HostDevice
from edje.perf.gpu_contest import make_pairs
from edje.runtime import graphs as module
from edje.runtime.graphs import SlotGraphs, total
from edje.runtime.pipeline import Pipeline, Request
from edje.runtime.source import HeldTokens
from edje.runtime.streams import Streams
from edje.runtime.text import TokenizedQueries
from recording_device import CapturableEngine, RecordingDevice, WatchedEngine
from toy_engine import ToyEngine, ToySource

STREAM = SimpleNamespace(handle=7)
PLAIN, LAUNCH, CAPTURE = "plain", "launch", "capture"


class Engine:
    """Tells what it is asked to do."""

    def __init__(self):
        self.done: list[tuple[str, object]] = []
        self.why_not: str | None = None
        self.refuses: Exception | None = None

    def enqueue(self, batch, scores, *, stream):
        self.done.append((PLAIN, batch))

    def why_not_capture(self, stream, bucket):
        return self.why_not

    def capturable(self, batch, scores, stream):
        if self.refuses is not None:
            raise self.refuses
        return lambda on: self.done.append((PLAIN if on is stream else CAPTURE, batch))


class Device:
    name = "pretended"
    shares_memory = False
    offers_graphs = True

    def __init__(self, engine):
        self.engine = engine
        self.alive = 0
        self.fails: Exception | None = None

    def capture(self, work, stream):
        if self.fails is not None:
            raise self.fails
        work(SimpleNamespace(handle=stream.handle))
        self.alive += 1
        batch = self.engine.done[-1][1]
        return SimpleNamespace(launch=lambda on: self._launch(batch), close=self._close)

    def _launch(self, batch):
        if self.fails is not None:
            raise self.fails
        self.engine.done.append((LAUNCH, batch))

    def _close(self):
        self.alive -= 1


class Bench:
    def __init__(self):
        self.engine = Engine()
        self.device = Device(self.engine)
        self.graphs = SlotGraphs(self.engine, self.device)

    def run(self, num_pairs, graphs=None):
        """Return what one batch of `num_pairs` led to."""
        pairs = np.zeros(num_pairs, np.int32)
        batch = Batch(np.zeros((1, 16), np.int32), np.zeros(1, np.int32), pairs, pairs)
        self.engine.done.clear()
        (graphs or self.graphs).enqueue(batch, np.zeros(num_pairs, np.float32), stream=STREAM)
        assert all(done is batch or len(done) == num_pairs for _, done in self.engine.done)
        return [what for what, _ in self.engine.done]

    def warm(self, *sizes):
        for num_pairs in (*sizes, *sizes):
            self.run(num_pairs)


def test_a_size_is_run_then_run_and_captured_then_launched():
    bench = Bench()
    assert [bench.run(5) for _ in range(4)] == [[PLAIN], [PLAIN, CAPTURE], [LAUNCH], [LAUNCH]]
    assert bench.run(6) == [PLAIN]
    other = SlotGraphs(bench.engine, bench.device)
    assert [bench.run(5, other) for _ in range(3)] == [[PLAIN], [PLAIN, CAPTURE], [LAUNCH]]
    report = total([bench.graphs.report(), other.report()])
    assert (report.captured, report.dropped, report.launched) == (2, 0, 3)
    assert report.plain == {module.FIRST: 3, module.WARM: 2}


def test_a_batch_that_hides_its_launches_is_run_plainly():
    bench = Bench()
    bench.warm(module.MOST_PAIRS, module.MOST_PAIRS + 1)
    assert bench.run(module.MOST_PAIRS) == [LAUNCH]
    assert bench.run(module.MOST_PAIRS + 1) == [PLAIN]
    assert bench.graphs.report().plain[module.LARGE] == 3


def test_the_graph_that_idled_longest_makes_room_and_is_freed(monkeypatch):
    monkeypatch.setattr(module, "MOST_GRAPHS", 3)
    monkeypatch.setattr(module, "IDLE_BATCHES", 10)
    bench = Bench()
    bench.warm(1, 2, 3)
    bench.run(1)
    bench.warm(4)
    assert bench.run(4) == [PLAIN], "all three were used a moment ago"
    for _ in range(10):
        bench.run(1)
    assert bench.run(4) == [PLAIN, CAPTURE]
    assert bench.device.alive == 3
    assert [bench.run(size) for size in (1, 3, 4)] == [[LAUNCH]] * 3
    report = bench.graphs.report()
    assert (report.captured, report.dropped) == (4, 1)
    assert report.plain[module.FULL] == 2


def test_more_sizes_than_graphs_in_turns_settle(monkeypatch):
    """Sizes that push each other out would be captured again and again, for nothing."""
    monkeypatch.setattr(module, "MOST_GRAPHS", 4)
    bench = Bench()
    for _ in range(200):
        for size in range(1, 6):
            bench.run(size)
    assert bench.graphs.report().captured == 4
    assert bench.graphs.report().launched == 4 * 198


def test_sizes_that_never_come_again_are_forgotten():
    bench = Bench()
    for size in range(1, 200):
        bench.run(size)
    first_kept = 200 - module.MOST_SEEN
    assert bench.run(first_kept - 1) == [PLAIN], "it was forgotten"
    assert bench.run(199) == [PLAIN, CAPTURE], "it was not"
    assert bench.run(1) == [PLAIN]
    assert bench.graphs.report().captured == 1


@pytest.mark.parametrize("error", [EngineError("no graphs"), RuntimeError("broke")])
def test_a_failing_capture_costs_nobody_anything_and_is_not_tried_again(error):
    bench = Bench()
    bench.run(5)
    bench.device.fails = error
    assert bench.run(5) == [PLAIN]
    bench.device.fails = None
    assert [bench.run(5) for _ in range(3)] == [[PLAIN]] * 3
    (told,) = set(bench.graphs.report().plain) - {module.FIRST, module.WARM}
    name = "" if isinstance(error, EngineError) else "RuntimeError: "
    assert told == f"a capture failed: {name}{error}"
    assert bench.graphs.report().plain[told] == 3


def test_an_engine_without_room_for_a_forward_runs_the_batch_plainly():
    bench = Bench()
    bench.run(5)
    bench.engine.refuses = EngineError("the memory is full")
    assert bench.run(5) == [PLAIN]
    assert bench.graphs.report().plain["no forward to capture: the memory is full"] == 1


def test_a_failing_launch_is_raised_once_and_its_graph_is_freed():
    bench = Bench()
    bench.warm(5)
    bench.device.fails = RuntimeError("broke")
    with pytest.raises(RuntimeError, match="broke"):
        bench.run(5)
    assert bench.device.alive == 0
    assert bench.run(5) == [PLAIN]
    assert bench.graphs.report().plain["a launch failed: RuntimeError: broke"] == 1


def test_a_slot_where_captures_keep_failing_captures_no_more():
    bench = Bench()
    bench.device.fails = RuntimeError("broke")
    bench.warm(*range(1, 20))
    assert len(bench.graphs.report().failed) == module.MOST_FAILURES
    bench.device.fails = None
    assert bench.run(19) == [PLAIN]


def test_an_engine_that_cannot_be_captured_never_is():
    bench = Bench()
    bench.engine.why_not = "it still compiles"
    bench.warm(5)
    assert bench.run(5) == [PLAIN]
    assert bench.graphs.report().plain["it still compiles"] == 2
    bench.engine.why_not = None
    assert [bench.run(5), bench.run(5)] == [[PLAIN, CAPTURE], [LAUNCH]]


def run(pipeline, num_batches=12):
    text_ids = np.full((1, 63), 1, np.int32)
    text_ids[0, 5:] = 0
    queries = TokenizedQueries(text_ids, np.array([5], np.int32), np.zeros(1, np.bool_))
    rows = np.arange(8 * num_batches)
    scores = pipeline.run(Request(queries, np.zeros(len(rows), np.int64), rows)).scores
    assert np.array_equal(scores, (rows + 5 / 1024).astype(np.float32))
    return pipeline.graphs


def pipeline_on(device, engine, **more):
    return Pipeline(engine, ToySource(), device, num_slots=2, **more)


def test_a_pipeline_launches_what_it_captured_and_scores_as_without():
    report = run(pipeline_on(RecordingDevice(1), CapturableEngine()))
    assert (report.captured, report.launched, sum(report.plain.values())) == (2, 8, 4)


def test_a_borrowed_stream_is_captured_only_where_it_is_lent_alone():
    device = RecordingDevice(1)
    with device.current():
        mine = device.stream()
        shared, alone = (Streams(device, borrowed=mine, exclusive=alone) for alone in (False, True))
    told = run(pipeline_on(device, CapturableEngine(), streams=shared)).plain
    assert told == {"the stream is the caller's, whose other work a capture could swallow": 12}
    assert run(pipeline_on(device, CapturableEngine(), streams=alone)).captured == 2


class LibraryWithoutGraphs(RecordingDevice):
    offers_graphs = False


def test_a_pipeline_says_why_it_has_no_graphs():
    bare = run(pipeline_on(LibraryWithoutGraphs(1), CapturableEngine()))
    told = "this library offers no graphs on recording: use the cuda_core device"
    assert (bare.plain, bare.captured) == ({told: 12}, 0)
    watched = run(pipeline_on(RecordingDevice(1), WatchedEngine()))
    assert watched.plain["toy has no forward that can be captured"] == 10
    off = run(pipeline_on(RecordingDevice(1), CapturableEngine(), graphs=False))
    assert off.plain == {"graphs are turned off": 12}
    host = HostDevice()
    assert run(pipeline_on(host, ToyEngine())).plain == {
        "the host launches no kernels: a graph would save nothing": 12
    }
    host.close()


def test_an_engine_captures_its_own_enqueue_unless_it_says_otherwise():
    engine, scores = ToyEngine(), np.empty(2, np.float32)
    batch = Batch(
        np.full((1, 8), 2, np.int32),
        np.full(1, 3, np.int32),
        np.zeros(2, np.int32),
        np.ones((2, 4, 8), np.float16),
    )
    stream = SimpleNamespace(handle=0, submit=lambda work: work())
    assert "toy has no forward" in engine.why_not_capture(stream, 8)
    engine.capturable(batch, scores, stream)(stream)
    assert scores.tolist() == [1 + 6 / 1024] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_real_engine_scores_by_graphs_as_without_while_sizes_take_turns(
    tiny_bundle, tmp_path, backend
):
    from edje.kernels.device.cuda_core import CudaCoreDevice

    try:
        require_builder(backend, "fp16", BuildOptions())
    except EngineError as error:
        pytest.skip(str(error))
    options = EngineOptions(max_pairs=32)
    build_engine(
        tiny_bundle, tmp_path / "engine", backend=backend, precision="fp16", options=options
    )
    (pairs,) = make_pairs(tiny_bundle, [13], num_pairs=100)
    kernels = {"dynamic_shapes_kernel_specialization_strategy": "eager"}
    settings = {} if backend == "tensorrt" else kernels
    engine = open_engine(tmp_path / "engine", OpenOptions(backend_settings=settings))
    device, source = CudaCoreDevice(), HeldTokens(np.arange(100), pairs.tokens)
    plain, graphs = (Pipeline(engine, source, device, graphs=wanted) for wanted in (False, True))
    queries = TokenizedQueries(pairs.text_ids, np.array([15], np.int32), np.zeros(1, np.bool_))
    for turn in range(40):
        rows = (np.arange((3, 32, 64, 9)[turn % 4]) * 7 + turn) % 100
        request = Request(queries, np.zeros(len(rows), np.int64), rows)
        expected = plain.run(request).scores
        np.testing.assert_allclose(graphs.run(request).scores, expected, atol=2e-3)
    report = graphs.graphs
    engine.close()
    device.close()
    if backend == "tensorrt" or report.captured:
        assert (report.captured, report.dropped) == (3 * 3, 0)
        assert report.launched == 50 - 2 * report.captured
    else:
        assert any("TensorRT-RTX says" in reason for reason in report.plain), report
