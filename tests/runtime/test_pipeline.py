"""Scores come back in request order, slots are reused, failures reach exactly their caller."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.errors import EngineError, StoppedError, StoreError
from edje.kernels.device.host import HostDevice
from edje.runtime.pipeline import NUM_SLOTS, Pipeline
from edje.runtime.streams import Streams
from toy_engine import ToyEngine, ToySource, toy_manifest, toy_request, toy_scores
from waiting import wait_until


class Rig:
    def __init__(self, engine=None, source=None, num_slots=NUM_SLOTS):
        self.engine = engine or ToyEngine()
        self.source = source or ToySource()
        self.device = HostDevice()
        self.pipeline = Pipeline(self.engine, self.source, self.device, num_slots=num_slots)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pipeline.close()
        self.device.close()

    def check(self, request):
        assert np.array_equal(self.pipeline.run(request).scores, toy_scores(request))

    def num_free_slots(self):
        return self.pipeline.usage().num_free


@st.composite
def random_requests(draw):
    lengths = draw(st.lists(st.integers(3, 63), min_size=1, max_size=5))
    pairs = draw(
        st.lists(st.tuples(st.integers(0, len(lengths) - 1), st.integers(0, 500)), max_size=60)
    )
    return toy_request(lengths, [q for q, _ in pairs], [row for _, row in pairs])


@settings(max_examples=50, deadline=None)
@given(random_requests(), st.integers(1, 4))
def test_scores_stand_where_their_pairs_stood(request_, num_slots):
    with Rig(num_slots=num_slots) as rig:
        rig.check(request_)
        assert rig.num_free_slots() == num_slots


def test_nothing_is_allocated_after_the_pipeline_was_made(monkeypatch):
    with Rig() as rig:
        for name in ("pinned", "mirror", "memory", "stream", "event"):
            monkeypatch.setattr(HostDevice, name, None)
        for start in range(5):
            rig.check(toy_request([5, 20, 63], np.arange(90) % 3, np.arange(start, start + 90)))
        assert len(rig.source.buffers) == NUM_SLOTS


def test_the_next_batch_is_gathered_while_one_computes():
    release = threading.Event()
    gathered_two = threading.Event()
    engine = ToyEngine(before=lambda batch: release.wait(10))
    source = ToySource()
    read = source.read

    def counting_read(rows, out, scales, *, bad):
        bad_records = read(rows, out, scales, bad=bad)
        if len(source.buffers) == 2:
            gathered_two.set()
        return bad_records

    source.read = counting_read
    with Rig(engine, source) as rig, ThreadPoolExecutor(1) as pool:
        request = toy_request([5], np.zeros(30), np.arange(30))
        future = pool.submit(rig.pipeline.run, request)
        assert gathered_two.wait(10), "the second batch was not gathered while the first computed"
        assert engine.batches == []
        release.set()
        assert np.array_equal(future.result(10).scores, toy_scores(request))


def test_damaged_records_are_nan_and_named():
    with Rig(source=ToySource(bad=[3, 17])) as rig:
        request = toy_request([5], np.zeros(20), np.arange(20))
        result = rig.pipeline.run(request)
        assert result.damaged == {3: "flipped", 17: "flipped"}
        sound = np.setdiff1d(np.arange(20), [3, 17])
        assert np.isnan(result.scores[[3, 17]]).all()
        assert np.array_equal(result.scores[sound], toy_scores(request)[sound])


def test_each_batch_is_announced_before_the_one_ahead_of_it_is_gathered():
    with Rig() as rig:
        rig.check(toy_request([5], np.zeros(24), np.arange(24)))
        first, second, third = (list(range(start, start + 8)) for start in (0, 8, 16))
        assert rig.source.calls == [
            ("prefetch", second),
            ("read", first),
            ("prefetch", third),
            ("read", second),
            ("read", third),
        ]


INT8_TOKENS = {"precision": "fp32", "token_dtype": "int8"}


def test_int8_tokens_reach_the_engine_with_their_scales():
    with Rig(ToyEngine(replace(toy_manifest(), **INT8_TOKENS))) as rig:
        rows = np.array([7, 107, 205, 599, 0] * 5)
        request = toy_request([5, 9], np.arange(25) % 2, rows)
        expected = toy_scores(replace(request, rows=rows % 100 * (rows // 100 + 1)))
        assert np.array_equal(rig.pipeline.run(request).scores, expected)


@pytest.mark.parametrize("changed", [{"precision": "int8"}, {"precision": "fp8"}, INT8_TOKENS])
def test_tokens_that_are_not_finite_give_no_score_where_the_engine_would_hide_them(changed):
    """Quantised linears turn NaN into numbers; the toy engine never looks at the last token."""
    engine = ToyEngine(replace(toy_manifest(), **changed))
    with Rig(engine, ToySource(broken=[3, 17])) as rig:
        request = toy_request([5], np.zeros(20), np.arange(20))
        result = rig.pipeline.run(request)
        assert np.flatnonzero(np.isnan(result.scores)).tolist() == [3, 17]
        assert result.damaged == {}


def test_times_of_the_stages_are_measured():
    with Rig(ToyEngine(before=lambda batch: threading.Event().wait(0.01))) as rig:
        began = time.perf_counter()
        result = rig.pipeline.run(toy_request([5], np.zeros(30), np.arange(30)))
        whole_ms = (time.perf_counter() - began) * 1e3
        assert 39 <= result.compute_ms <= whole_ms  # four batches of at least 10 ms
        assert 0 < result.gather_ms <= whole_ms


def fail_on_row(row, error):
    def before(batch):
        if (batch.visual_tokens[:, 0, 0] == row).any():
            raise error

    return before


@pytest.mark.parametrize("row", [0, 15, 39])
@pytest.mark.parametrize("num_slots", [1, 3])
@pytest.mark.parametrize("stage", ["gather", "compute"])
def test_a_failing_stage_reaches_the_caller_and_frees_the_slots(row, num_slots, stage):
    source, engine = ToySource(), ToyEngine()
    if stage == "gather":
        source.fail = {row: StoreError("disk gone")}
        error, says = StoreError, "disk gone"
    else:
        engine.before = fail_on_row(row, RuntimeError("kernel broke"))
        error, says = EngineError, "engine failed on a batch: kernel broke"
    with Rig(engine, source, num_slots) as rig:
        with pytest.raises(error, match=says):
            rig.pipeline.run(toy_request([5], np.zeros(40), np.arange(40)))
        assert rig.num_free_slots() == num_slots
        rig.check(toy_request([5], np.zeros(40), np.arange(100, 140)))


def refuse(*_, **__):
    raise EngineError("this batch does not fit the engine")


def test_a_refusing_engine_reaches_the_caller_and_frees_the_slots():
    with Rig() as rig:
        request = toy_request([5], np.zeros(9), np.arange(9))
        rig.engine.manifest = toy_manifest(max_pairs=16)  # larger than the slots were made for
        with pytest.raises(EngineError, match=r"not be gathered: .*reshape.*\nStage: gather"):
            rig.pipeline.run(request)
        assert rig.num_free_slots() == NUM_SLOTS
        rig.engine.manifest = toy_manifest(text_buckets=(9, 64))
        rig.engine.enqueue = refuse
        with pytest.raises(EngineError, match="does not fit"):
            rig.pipeline.run(request)
        del rig.engine.enqueue
        assert rig.num_free_slots() == NUM_SLOTS
        rig.check(request)


def test_only_the_callers_of_failing_batches_see_the_error():
    engine = ToyEngine(before=fail_on_row(1000, RuntimeError("row 1000")))
    with Rig(engine) as rig, ThreadPoolExecutor(16) as pool:

        def call(number):
            first = 990 if number % 4 == 0 else number * 30
            request = toy_request([5], np.zeros(25), np.arange(first, first + 25))
            try:
                return np.array_equal(rig.pipeline.run(request).scores, toy_scores(request))
            except EngineError:
                return "failed"

        outcomes = list(pool.map(call, range(32)))
        assert outcomes == ["failed" if n % 4 == 0 else True for n in range(32)]
        assert rig.num_free_slots() == NUM_SLOTS


def test_many_threads_share_the_slots_and_get_their_own_scores():
    with Rig() as rig, ThreadPoolExecutor(32) as pool:

        def call(number):
            lengths = [3 + number % 40, 50]
            rows = np.arange(number, number + 37)
            rig.check(toy_request(lengths, rows % 2, rows))
            return True

        assert all(pool.map(call, range(200)))
        assert rig.num_free_slots() == NUM_SLOTS
        assert len(rig.source.buffers) <= NUM_SLOTS


def test_a_small_request_does_not_wait_for_a_large_one_to_end():
    turn = threading.Semaphore(0)
    engine = ToyEngine(before=lambda batch: turn.acquire(timeout=10))
    with Rig(engine) as rig, ThreadPoolExecutor(2) as pool:
        rows = np.arange(8 * 200)
        large = pool.submit(rig.pipeline.run, toy_request([5], np.zeros(len(rows)), rows))
        try:
            wait_until(lambda: len(rig.source.buffers) == NUM_SLOTS)
            small = pool.submit(rig.pipeline.run, toy_request([5], np.zeros(1), [400]))
            wait_until(lambda: rig.pipeline.usage().num_waiting)
            while not small.done():
                turn.release()
                threading.Event().wait(0.001)
        finally:
            turn.release(1000)
        large.result(10)
        assert [num_pairs for num_pairs, _ in engine.batches].index(1) < 100


def test_close_lets_running_batches_finish_and_refuses_the_rest():
    release = threading.Event()
    engine = ToyEngine(before=lambda batch: release.wait(10))
    with Rig(engine) as rig, ThreadPoolExecutor(8) as pool:
        long = pool.submit(rig.pipeline.run, toy_request([5], np.zeros(80), np.arange(80)))
        wait_until(lambda: len(rig.source.buffers) == NUM_SLOTS)  # it holds every slot
        waiting = [
            pool.submit(rig.pipeline.run, toy_request([5], np.zeros(8), np.arange(8)))
            for _ in range(4)
        ]
        wait_until(lambda: rig.pipeline.usage().num_waiting == 4)
        rig.pipeline.close()
        release.set()
        for future in (long, *waiting):
            with pytest.raises(EngineError, match="closed"):
                future.result(10)
        assert rig.num_free_slots() == NUM_SLOTS


def test_a_deadline_that_has_passed_starts_no_batch():
    with Rig() as rig:
        request = toy_request([5], np.zeros(9), np.arange(9))
        with pytest.raises(StoppedError, match="deadline passed"):
            rig.pipeline.run(replace(request, deadline=time.monotonic()))
        assert rig.source.calls == []
        later = replace(request, deadline=time.monotonic() + 60)
        assert np.array_equal(rig.pipeline.run(later).scores, toy_scores(request))


def test_a_deadline_ends_the_wait_for_a_slot():
    release = threading.Event()
    engine = ToyEngine(before=lambda batch: release.wait(10))
    with Rig(engine) as rig, ThreadPoolExecutor(2) as pool:
        try:
            long = pool.submit(rig.check, toy_request([5], np.zeros(80), np.arange(80)))
            wait_until(lambda: len(rig.source.buffers) == NUM_SLOTS)  # it holds every slot
            request = toy_request([5], np.zeros(8), np.arange(8))
            with pytest.raises(StoppedError, match="deadline passed"):
                rig.pipeline.run(replace(request, deadline=time.monotonic() + 0.05))
            assert not long.done()
            assert rig.pipeline.usage().num_waiting == 0
        finally:
            release.set()
        long.result(10)
        assert rig.num_free_slots() == NUM_SLOTS


def test_a_callers_own_stream_computes():
    device = HostDevice()
    mine, workers = device.stream(), []
    engine, threads = ToyEngine(), set()
    engine.before = lambda batch: threads.add(threading.current_thread())
    mine.submit(lambda: workers.append(threading.current_thread()))
    pipeline = Pipeline(engine, ToySource(), device, streams=Streams(device, borrowed=mine))
    request = toy_request([5], np.zeros(20), np.arange(20))
    assert np.array_equal(pipeline.run(request).scores, toy_scores(request))
    assert threads == set(workers)
    assert device.usage().num_streams == 1
    with pytest.raises(EngineError, match="borrows host streams, got str"):
        Streams(device, borrowed="stream")
    pipeline.close()
    device.close()


def test_no_pairs_give_no_scores():
    with Rig() as rig:
        result = rig.pipeline.run(toy_request([5], [], []))
        assert result.scores.shape == (0,)
        assert rig.engine.batches == []
