"""Threads that copy beside the caller: all are waited for, and errors come out."""

from __future__ import annotations

import os
import threading
from itertools import count

import pytest

from edje.runtime.store.read.threads import BYTES_A_THREAD, CopyThreads


@pytest.fixture
def threads() -> CopyThreads:
    made = CopyThreads()
    made.most = 3
    return made


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
    threads.run(lambda: void(meeting.wait()), 2)
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
    threads.run(lambda: void(None), 1)
    assert not threads._pool._threads


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
