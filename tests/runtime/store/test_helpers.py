"""The threads of a reader: what they are asked for is done once, called off, or refused."""

from __future__ import annotations

import threading
import time

import pytest

from edje.runtime.store.read import helpers
from edje.runtime.store.read.helpers import Helpers


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "edje-read"}


def test_work_is_done_beside_the_caller_and_threads_are_used_again() -> None:
    before, team = threads(), Helpers(2)
    for _ in range(20):
        together = threading.Barrier(3)  # two helpers and the caller
        tasks = team.ask(5, lambda: void(together.wait(10)))  # noqa: B023
        together.wait(10)
        assert [task.finish() for task in tasks] == [None, None]
        made = threads() - before
        assert len(made) == 2
    team.close()
    team.close()
    for thread in made:
        thread.join(10)
        assert not thread.is_alive()


def void(_: object) -> None:
    """Take a value and give none."""


def test_work_that_nobody_has_begun_is_called_off() -> None:
    team, go, done = Helpers(1), threading.Event(), []
    (slow,) = team.ask(1, lambda: void(go.wait(10)))
    (late,) = team.ask(1, lambda: done.append(1))
    assert late.finish() is None, "at once: the only thread is busy"
    go.set()
    assert slow.finish() is None
    (last,) = team.ask(1, lambda: done.append(2))
    while not done:
        time.sleep(0.001)
    assert last.finish() is None
    assert done == [2]


def test_errors_come_to_whoever_asked() -> None:
    team, begun = Helpers(1), threading.Event()

    def fail() -> None:
        begun.set()
        raise KeyError("lost")

    (task,) = team.ask(1, fail)
    assert begun.wait(10)
    assert isinstance(task.finish(), KeyError)


def test_without_threads_there_are_no_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(helpers, "Thread", Refused)
    assert Helpers(3).ask(3, lambda: None) == []
    assert Helpers(0).ask(1, lambda: None) == []


def test_threads_of_helpers_that_are_forgotten_end() -> None:
    before, team = threads(), Helpers(1)
    for task in team.ask(1, lambda: None):
        task.finish()
    (made,) = threads() - before
    del team
    made.join(10)
    assert not made.is_alive()
