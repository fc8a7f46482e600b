"""The pipeline over random schedules: whatever order a device finishes in, nothing is early.

2,200 schedules run in all, over the recording device and over the host; more than half of
them with CUDA graphs, and some of these with room for two graphs a slot.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edje.errors import EdjeError, EngineError, StoppedError, StoreError
from edje.kernels.device.host import HostDevice
from edje.runtime import graphs as graphs_module
from edje.runtime import pipeline as pipeline_module
from edje.runtime.graphs import SlotGraphs
from edje.runtime.pipeline import Pipeline, Request
from edje.runtime.slot import Slot, SlotRing
from edje.runtime.streams import Streams
from recording_device import (
    CapturableEngine,
    RecordingDevice,
    RecordingEvent,
    RecordingGraph,
    RecordingStream,
    poison,
)
from toy_engine import ToySource, toy_request, toy_scores

BROKEN_ROW = 700
SLOTS = st.integers(1, 4)
GRAPHS = st.sampled_from(["off", "on", "tight"])


class WatchedSlot(Slot):
    """Tells a recording device what the host touches."""

    def __init__(self, device: Any, *args: Any, **more: Any):
        self.touch = getattr(device, "touch", lambda *arrays, writes: None)
        super().__init__(device, *args, **more)

    def fill_text(self, queries, planned):
        super().fill_text(queries, planned)
        host = self.host
        self.touch(host.text_ids, host.text_length, host.query_of_pair, writes=True)

    def read(self, source, rows, *, check_finite):
        self.touch(self.host.visual_tokens, self.host.visual_scales, writes=True)
        return super().read(source, rows, check_finite=check_finite)

    def upload(self, stream):
        """Poison what the engine shall write as well: a graph that writes nothing is found out."""
        super().upload(stream)
        scores = self.batch_scores
        if isinstance(stream, RecordingStream):
            writes = stream.device.buffers_of(scores)
            stream.submit(lambda: poison(scores), what="poison", writes=writes)

    @property
    def scores(self):
        self.touch(self.downloaded, writes=False)
        return self.downloaded

    @scores.setter
    def scores(self, downloaded):
        self.downloaded = downloaded


@pytest.fixture(autouse=True)
def watched_slots(monkeypatch):
    monkeypatch.setattr(pipeline_module, "Slot", WatchedSlot)
    for name in ("MOST_GRAPHS", "IDLE_BATCHES"):
        monkeypatch.setattr(
            graphs_module, name, getattr(graphs_module, name)
        )  # put back at the end


@dataclass
class Rig:
    """A pipeline over one device; `finish` checks that all is well and nothing was made late."""

    device: Any
    num_slots: int
    graphs: str = "off"

    def __post_init__(self):
        tight = self.graphs == "tight"
        graphs_module.MOST_GRAPHS, graphs_module.IDLE_BATCHES = (2, 1) if tight else (16, 256)
        self.engine, self.source = CapturableEngine(before=fail_on_broken), ToySource()
        self.pipeline = Pipeline(
            self.engine,
            self.source,
            self.device,
            num_slots=self.num_slots,
            graphs=self.graphs != "off",
        )
        self.made = self.device.usage()

    def check(self, request):
        scores = self.pipeline.run(request).scores
        assert np.array_equal(scores, toy_scores(request))

    def outcome(self, request):
        """Return the error that the request ends with; None after right scores."""
        try:
            self.check(request)
        except EdjeError as error:
            return error
        return None

    def finish(self):
        assert getattr(self.device, "races", []) == []
        assert self.pipeline.usage() == (self.num_slots, self.num_slots, 0)
        assert replace(self.device.usage(), num_graphs=0) == self.made
        report = self.pipeline.graphs
        assert self.device.usage().num_graphs == report.captured - report.dropped
        assert report.captured <= graphs_module.MOST_GRAPHS * self.num_slots + report.dropped
        self.pipeline.close()
        self.device.close()


def fail_on_broken(batch):
    if (batch.visual_tokens[:, 0, 0] == BROKEN_ROW).any():
        raise RuntimeError("kernel broke")


@st.composite
def requests(draw, max_pairs=40):
    """Pairs of up to three queries, rows 0 to 500; batches of at most 8."""
    lengths = draw(st.lists(st.integers(3, 63), min_size=1, max_size=3))
    num_pairs = draw(st.integers(1, max_pairs))
    start, step = draw(st.integers(0, 99)), draw(st.integers(1, 10))
    return toy_request(
        lengths, np.arange(num_pairs) * step % len(lengths), start + step * np.arange(num_pairs)
    )


DEVICES = st.one_of(
    st.integers(0, 2**32).map(RecordingDevice),
    st.integers(0, 2**32).map(RecordingDevice),
    st.builds(HostDevice),
)
many = settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
some = settings(many, max_examples=300)
few = settings(many, max_examples=100)


@many
@given(DEVICES, st.lists(requests(), min_size=1, max_size=3), SLOTS, GRAPHS, st.integers(1, 4))
def test_every_schedule_gives_every_pair_its_own_score(device, asked, num_slots, graphs, rounds):
    rig = Rig(device, num_slots, graphs)
    assert [rig.outcome(request) for request in asked * rounds] == [None] * len(asked) * rounds
    rig.finish()


@some
@given(DEVICES, st.lists(requests(), min_size=2, max_size=4), SLOTS, GRAPHS)
def test_threads_that_share_the_slots_do_not_meet_in_them(device, asked, num_slots, graphs):
    rig = Rig(device, num_slots, graphs)
    with ThreadPoolExecutor(len(asked)) as pool:
        outcomes = list(pool.map(rig.outcome, asked * (1 if graphs == "off" else 3)))
    assert not any(outcomes)
    rig.finish()


BREAKS = {
    "gather": "gather",
    "upload": "copy",
    "uploading": "copy",
    "compute": "compute",
    "download": "collect",
    "downloading": "collect",
}


@some
@given(
    st.integers(0, 2**32),
    requests(),
    SLOTS,
    GRAPHS,
    st.sampled_from(list(BREAKS)),
    st.integers(0, 39),
    st.integers(1, 12),
)
def test_a_failure_at_any_stage_reaches_its_caller_by_name(
    seed, request_, num_slots, graphs, what, at, n
):
    device = RecordingDevice(seed)
    rig = Rig(device, num_slots, graphs)
    for _ in range(0 if graphs == "off" else 3 * num_slots):
        rig.check(request_)
    sound = toy_request([5], np.zeros(20), np.arange(20))
    place = at % len(request_.rows)
    if what == "gather":
        rig.source.fail = {int(request_.rows[place]): StoreError("disk gone")}
    elif what == "compute":
        request_.rows[place] = BROKEN_ROW
    else:
        device.failures[what] = n
    error = rig.outcome(request_)
    if error is None:
        assert device.failures[what] > 0, "a failure was lost"
    else:
        assert error.stage == BREAKS[what]
        assert f"Stage: {BREAKS[what]}" in str(error)
        assert isinstance(error, StoreError if what == "gather" else EngineError)
    rig.source.fail = {}
    device.failures.clear()
    rig.check(sound)
    rig.finish()


GRAPH_BREAKS = {"capture": "a capture failed", "launch": "a launch failed", "launching": None}


@few
@given(
    st.integers(0, 2**32),
    requests(),
    SLOTS,
    st.sampled_from(["on", "tight"]),
    st.sampled_from(list(GRAPH_BREAKS)),
    st.integers(1, 8),
)
def test_a_failing_graph_is_compute_or_nobodys_error_and_is_reported(
    seed, request_, num_slots, graphs, what, n
):
    device = RecordingDevice(seed)
    rig = Rig(device, num_slots, graphs)
    device.failures[what] = n
    errors = [error for _ in range(12) if (error := rig.outcome(request_)) is not None]
    failed = device.failures[what] <= 0
    assert [error.stage for error in errors] == (
        ["compute"] if failed and what != "capture" else []
    )
    assert all(isinstance(error, EngineError) for error in errors)
    assert all(f"{what} broke" in str(error) for error in errors)
    told = f"{GRAPH_BREAKS[what]}: RuntimeError: {what} broke"
    assert list(rig.pipeline.graphs.failed) == ([told] if failed and what != "launching" else [])
    rig.finish()


@few
@given(st.integers(0, 2**32), st.lists(requests(), min_size=1, max_size=2), SLOTS)
def test_sizes_that_have_their_graphs_are_launched_and_nothing_is_captured(seed, asked, num_slots):
    rig = Rig(RecordingDevice(seed), num_slots, "on")
    for request in asked * (12 * num_slots):
        rig.check(request)
    warm, made = rig.pipeline.graphs, rig.device.usage()
    assert warm.captured > 0
    before = len(rig.engine.batches)
    for request in asked * 2:
        rig.check(request)
    after = rig.pipeline.graphs
    assert (after.captured, after.dropped, after.plain) == (warm.captured, 0, warm.plain)
    assert after.launched - warm.launched == len(rig.engine.batches) - before > 0
    assert rig.device.usage() == made
    rig.finish()


@few
@given(DEVICES, st.integers(2, 6), st.data())
def test_only_the_callers_of_failing_batches_see_the_failure(device, num_callers, data):
    rig = Rig(device, 3, "on")
    broken = data.draw(st.sets(st.integers(0, num_callers - 1)))

    def call(number):
        rows = np.arange(20) + 20 * number
        rows[7] = BROKEN_ROW if number in broken else rows[7]
        error = rig.outcome(toy_request([5], np.zeros(20), rows))
        return "sound" if error is None else error.stage

    with ThreadPoolExecutor(num_callers) as pool:
        outcomes = list(pool.map(call, range(num_callers)))
    assert outcomes == ["compute" if n in broken else "sound" for n in range(num_callers)]
    rig.finish()


@few
@given(DEVICES, requests(), SLOTS, st.integers(0, 8))
def test_close_during_work_leaves_nothing_running(device, request_, num_slots, after):
    rig = Rig(device, num_slots, "on")
    read, reads = rig.source.read, []

    def closing_read(*arguments, **named):
        reads.append(arguments)
        if len(reads) == after:
            rig.pipeline.close()
        return read(*arguments, **named)

    rig.source.read = closing_read
    error = rig.outcome(request_)
    assert error is None or "closed" in error.message
    rig.pipeline.close()
    with pytest.raises(EngineError, match="closed"):
        rig.check(request_)
    rig.finish()
    if isinstance(device, RecordingDevice):
        assert device.is_idle()


@few
@given(DEVICES, requests(), SLOTS, st.integers(0, 6))
def test_a_request_nobody_wants_any_more_stops_and_gives_its_slots_back(
    device, request_, num_slots, after
):
    rig = Rig(device, num_slots, "on")
    asked = []
    unwanted = Request(
        request_.queries,
        request_.query_of_pair,
        request_.rows,
        cancelled=lambda: asked.append(1) or len(asked) > after,
    )
    error = rig.outcome(unwanted)
    assert isinstance(error, StoppedError) if len(asked) > after else error is None
    if error is not None:
        known = error.partial
        right = np.where(known.skipped, np.nan, toy_scores(request_))
        assert np.array_equal(known.scores, right, equal_nan=True)
        assert known.skipped.any(), "nothing was left to do"
    rig.check(request_)
    rig.finish()


@few
@given(st.integers(0, 2**32), requests(), SLOTS, st.integers(0, 60))
def test_a_lost_device_says_so_and_takes_no_more_work(seed, request_, num_slots, at):
    device = RecordingDevice(seed)
    rig = Rig(device, num_slots, "on")
    device.lose_after = at
    error = rig.outcome(request_)
    if device.lost is None:
        assert error is None
        return
    for failure in (error or rig.outcome(request_), rig.outcome(request_)):
        assert isinstance(failure, EngineError)
        assert re.match("recording is lost, it takes no more .* illegal memory", failure.message)
        assert "restart the process" in failure.hint
    assert rig.pipeline.usage().num_free == num_slots


SPOILT = {
    "compute does not wait for the copy": ("wait", "compute"),
    "the result does not wait for compute": ("wait", "result"),
    "scores are read before they arrived": ("collect", None),
    "slots come back before they are free": ("give_back", None),
    "the device is not made current": ("current", None),
    "a graph runs over another slot's buffers": ("graphs", None),
    "a graph holds nothing": ("empty", None),
    "a graph is freed while it runs": ("free", None),
    "somebody submits while a graph is captured": ("capture", None),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_the_recording_device_finds_a_spoilt_pipeline(spoilt, monkeypatch):
    """The control: each broken order must be found in a handful of schedules."""
    what, which = SPOILT[spoilt]
    found = 0
    for seed in range(20):
        device = RecordingDevice(seed)
        with monkeypatch.context() as patch:
            rig = Rig(device, 2, "on")
            spoil(rig, what, which, patch)
            request = toy_request([5], np.zeros(40), np.arange(40))
            try:
                error = rig.outcome(request)
            except AssertionError as wrong:
                error = wrong
            found += error is not None or bool(device.races)
    assert found == 20


def intruding(work, stream):
    """Return `work` with another's work on the stream that is captured meanwhile."""

    def both(capturing):
        work(capturing)
        stream.submit(lambda: None)

    return both


def spoil(rig, what, which, patch):
    if what == "wait":
        number = {"compute": 0, "result": 2}[which]  # in the order that `Streams` makes them
        wait = RecordingStream.wait
        patch.setattr(
            RecordingStream,
            "wait",
            lambda stream, event: None if stream.place == number else wait(stream, event),
        )
    elif what == "collect":
        patch.setattr(Streams, "collect", lambda self, slot: None)
        patch.setattr(RecordingEvent, "elapsed_ms", lambda event, since: 0.0)
    elif what == "give_back":
        for name in ("take", "try_take"):
            patch.setattr(SlotRing, name, giving_back(getattr(SlotRing, name)))
    elif what == "graphs":
        enqueue, first = SlotGraphs.enqueue, []

        def shared(mine, batch, scores, *, stream):
            first.append(mine)
            enqueue(first[0], batch, scores, stream=stream)

        patch.setattr(SlotGraphs, "enqueue", shared)
    elif what == "empty":
        patch.setattr(RecordingGraph, "launch", lambda graph, stream: None)
    elif what == "free":
        launch = RecordingGraph.launch
        patch.setattr(RecordingGraph, "launch", lambda *known: (launch(*known), known[0].close()))
    elif what == "capture":
        capture = rig.device.capture
        patch.setattr(rig.device, "capture", lambda work, on: capture(intruding(work, on), on))
    else:
        patch.setattr(rig.device, "current", HostDevice().current)


def giving_back(take):
    """Return `take` that gives the slot back at once, so that others may take it, too."""

    def spoilt(ring, *timeout):
        slot = take(ring, *timeout)
        if slot is not None:
            ring.give_back(slot)
        return slot

    return spoilt
