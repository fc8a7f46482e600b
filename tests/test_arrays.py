"""Threads that copy beside the caller: all are waited for, and errors come out."""

from __future__ import annotations

import os
import threading
from itertools import count

import numpy as np
import pytest

from edje.arrays import BYTES_A_THREAD, CopyThreads


@pytest.fixture
def threads() -> CopyThreads:
    return CopyThreads(most=3)


def test_everything_is_done_once_whoever_does_it(threads):
    for num_threads in (1, 2, 3):
        parts, done = iter(range(200)), []

        def work(parts=parts, done=done) -> None:
            for part in parts:
                done.append(part)

        threads.run(work, num_threads)
        assert sorted(done) == list(range(200))
    threads.close()


def test_others_work_beside_the_caller(threads):
    meeting = threading.Barrier(2, timeout=10)
    at_work: list[int] = []

    def work() -> None:
        meeting.wait()
        at_work.append(threading.get_ident())

    threads.run(work, 2)
    assert len(set(at_work)) == 2
    assert threading.get_ident() in at_work
    threads.close()


def void(_: object) -> None:
    """Take a value and give none."""


def test_an_error_of_any_thread_comes_out_once_all_are_through(threads):
    meeting, numbers, through = threading.Barrier(2, timeout=10), count(), []

    def work() -> None:
        meeting.wait()
        if next(numbers) == 1:
            raise ValueError("torn")
        through.append(True)

    for _ in range(20):
        with pytest.raises(ValueError, match="torn"):
            threads.run(work, 2)
        numbers = count()
    assert len(through) == 20
    threads.close()


def test_little_is_copied_by_the_caller_alone(threads):
    assert [threads.count_for(size * BYTES_A_THREAD) for size in (0, 1, 2, 9)] == [1, 1, 2, 3]
    before = threading.active_count()
    threads.run(lambda: void(None), 1)
    threads.take(np.zeros((9, 8)), np.arange(9), np.empty((9, 8)))
    assert threading.active_count() == before


@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 7])
def test_rows_are_taken_in_the_order_asked_whoever_copies(threads, num_rows):
    source = np.random.default_rng(0).random((9, BYTES_A_THREAD // 8))
    places = np.random.default_rng(num_rows).integers(0, 9, num_rows)
    out = np.full((num_rows, *source.shape[1:]), np.nan)
    threads.take(source, places, out)
    np.testing.assert_array_equal(out, source[places])
    threads.close()


def test_some_megabytes_are_shared_by_two_threads(threads):
    meeting = threading.Barrier(2, timeout=10)
    parts = []

    def work(part: slice) -> None:
        parts.append(range(part.start, part.stop))
        meeting.wait()  # passed only when two threads are at it at once

    threads.share(10, 2 * BYTES_A_THREAD, work)
    assert sorted(at for part in parts for at in part) == list(range(10))
    threads.close()


def test_a_forked_child_makes_threads_of_its_own(threads):
    meeting = threading.Barrier(2, timeout=10)
    threads.run(lambda: void(meeting.wait()), 2)
    child = os.fork()
    if child == 0:
        try:
            threads.run(lambda: void(meeting.wait()), 2)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    threads.close()


def test_without_threads_the_caller_does_all(threads):
    threads.close()
    parts, done = iter(range(5)), []
    threads.run(lambda: done.extend(parts), 3)
    assert done == [0, 1, 2, 3, 4]
