"""The host device keeps the order it promises and carries errors to whoever waits."""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.arrays import DeviceArray
from edje.errors import EngineError
from edje.kernels.device.contract import DeviceUsage
from edje.kernels.device.host import HostDevice, HostEvent, InlineStream
from waiting import stream_threads


@pytest.fixture
def device():
    device = HostDevice()
    yield device
    device.close()


def fails(event):
    try:
        event.synchronize()
    except ZeroDivisionError:
        return True
    return False


def test_work_runs_in_order_on_another_thread(device):
    stream, event, seen = device.stream(), device.event(), []
    for number in range(100):
        stream.submit(lambda number=number: seen.append((number, threading.get_ident())))
    stream.record(event)
    event.synchronize()
    assert [number for number, _ in seen] == list(range(100))
    assert {thread for _, thread in seen} != {threading.get_ident()}


def test_an_error_skips_to_the_next_event_and_the_stream_goes_on(device):
    stream, first, second, seen = device.stream(), device.event(), device.event(), []
    stream.submit(lambda: 1 / 0)
    stream.submit(lambda: seen.append("skipped"))
    stream.record(first)
    stream.submit(lambda: seen.append("ran"))
    stream.record(second)
    with pytest.raises(ZeroDivisionError):
        first.synchronize()
    second.synchronize()
    assert seen == ["ran"]


def test_waiting_orders_streams_and_hands_the_error_on(device):
    first, second = device.stream(), device.stream()
    ready, done, seen = device.event(), device.event(), []
    first.submit(lambda: time.sleep(0.02))
    first.submit(lambda: seen.append("first"))
    first.record(ready)
    second.wait(ready)
    second.submit(lambda: seen.append("second"))
    second.record(done)
    done.synchronize()
    assert seen == ["first", "second"]
    first.submit(lambda: 1 / 0)
    first.record(ready)
    second.wait(ready)
    second.submit(lambda: seen.append("third"))
    second.record(done)
    with pytest.raises(ZeroDivisionError):
        done.synchronize()
    assert seen == ["first", "second"]


def test_elapsed_time_is_the_work_between_two_events(device):
    stream, start, end = device.stream(), device.event(), device.event()
    began = time.perf_counter()
    stream.record(start)
    stream.submit(lambda: time.sleep(0.03))
    stream.record(end)
    end.synchronize()
    assert 29 <= end.elapsed_ms(start) <= (time.perf_counter() - began) * 1e3


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["work", "fail", "event"]), max_size=30))
def test_events_carry_exactly_the_failures_since_the_last_event(script):
    device = HostDevice()
    stream, events, expected, failed = device.stream(), [], [], False
    for step in [*script, "event"]:
        if step == "event":
            events.append(device.event())
            stream.record(events[-1])
            expected.append(failed)
            failed = False
        elif step == "fail":
            stream.submit(lambda: 1 / 0)
            failed = True
        else:
            stream.submit(lambda: None)
    assert [fails(event) for event in events] == expected
    device.close()


def test_buffers_are_page_aligned_and_mirrored_without_a_copy(device):
    pinned = device.pinned(1000, np.dtype(np.float16))
    mirror = device.mirror(pinned)
    pinned.view((10, 100))[:] = 3
    assert pinned.view((10, 100)).ctypes.data % 4096 == 0
    assert pinned.view((10, 100)).flags.c_contiguous
    assert mirror.view((4, 25)).tolist() == np.full((4, 25), 3).tolist()
    assert np.shares_memory(pinned.view((1000,)), mirror.view((1000,)))


def test_a_graph_runs_its_work_again_at_every_launch(device):
    stream, event, seen = device.stream(), device.event(), []

    def work(capturing):
        capturing.submit(lambda: seen.append("a"))
        capturing.submit(lambda: seen.append("b"))

    graph = device.capture(work, stream)
    assert seen == []
    assert device.usage().num_graphs == 1
    graph.launch(stream)
    graph.launch(stream)
    stream.record(event)
    event.synchronize()
    assert seen == ["a", "b", "a", "b"]
    graph.close()
    assert device.usage().num_graphs == 0
    with pytest.raises(EngineError, match="event"):
        device.capture(lambda capturing: capturing.record(HostEvent()), stream)


def test_an_event_that_was_never_recorded_is_passed(device):
    stream, event, seen = device.stream(), device.event(), []
    event.synchronize()
    stream.wait(event)
    stream.submit(lambda: seen.append("ran"))
    stream.record(event)
    event.synchronize()
    assert seen == ["ran"]


def test_a_wait_means_the_event_as_it_was_recorded_then(device):
    """Recorded again meanwhile: who waited for the first recording is not held up by the second."""
    first, second = device.stream(), device.stream()
    event, done, never = device.event(), device.event(), threading.Event()
    first.record(event)
    second.wait(event)
    first.submit(lambda: never.wait(5))
    first.record(event)
    second.record(done)
    done.synchronize()
    assert not never.is_set()
    never.set()
    event.synchronize()


def test_usage_counts_what_was_made_until_it_is_closed():
    device = HostDevice()
    device.mirror(device.pinned(100, np.dtype(np.float32)))
    device.stream()
    device.event()
    assert device.usage() == DeviceUsage(400, 0, 1, 1)
    device.close()
    assert device.usage() == DeviceUsage()


def test_the_host_runs_no_device_code(device):
    with pytest.raises(EngineError, match="no device code"):
        device.load_module(b"cubin")
    array = DeviceArray(16, (8, 64), np.dtype(np.float16))
    with pytest.raises(EngineError, match="no tensor maps"):
        device.tensor_map(array, (8, 64), row_stride=64, swizzle=3, element=6)
    assert device.fault() is None


def test_a_foreign_event_is_refused(device):
    with pytest.raises(EngineError, match="host events, got object"):
        device.stream().record(object())


def test_close_finishes_queued_work_and_ends_the_thread():
    others, device, seen = stream_threads(), HostDevice(), []
    stream = device.stream()
    (worker,) = stream_threads() - others
    stream.submit(lambda: time.sleep(0.02))
    stream.submit(lambda: seen.append("ran"))
    device.close()
    device.close()
    assert seen == ["ran"]
    assert not worker.is_alive()


def test_a_forgotten_stream_ends_its_thread():
    others = stream_threads()
    stream = HostDevice().stream()
    (worker,) = stream_threads() - others
    del stream
    gc.collect()
    worker.join(5)
    assert not worker.is_alive()


def test_an_inline_stream_runs_work_at_once_and_raises_where_it_is_called():
    device, stream, seen = HostDevice(), InlineStream(), []
    event = device.event()
    stream.submit(lambda: seen.append(threading.current_thread()))
    stream.record(event)
    stream.wait(event)
    event.synchronize()
    assert seen == [threading.current_thread()]
    with pytest.raises(ZeroDivisionError):
        stream.submit(lambda: 1 / 0)
    stream.close()


def test_work_run_here_runs_on_this_thread_while_the_worker_waits():
    device = HostDevice()
    stream, event, seen = device.stream(), device.event(), []

    def here(inline) -> None:
        stream.submit(lambda: seen.append(("worker", threading.current_thread())))
        stream.record(event)
        time.sleep(0.05)
        inline.submit(lambda: seen.append(("here", threading.current_thread())))

    stream.run_here(here)
    event.synchronize()
    assert [name for name, _ in seen] == ["here", "worker"]
    assert seen[0][1] is threading.current_thread()
    assert seen[1][1] is not threading.current_thread()
    device.close()


def test_work_run_here_fails_here_and_the_stream_goes_on():
    device = HostDevice()
    stream, event, seen = device.stream(), device.event(), []

    def fail(inline) -> None:
        inline.submit(lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        stream.run_here(fail)
    stream.submit(lambda: seen.append(1))
    stream.record(event)
    event.synchronize()
    assert seen == [1]
    device.close()
