"""Limits of time: what is due is called in time and in order, what was cancelled is not."""

from __future__ import annotations

import asyncio
import gc

import pytest

from edje.runtime.server.time_limit import LEAST_ROOM, TimeLimit, Timer, Timers


async def until(called: list, number: int) -> None:
    for _ in range(2000):
        if len(called) >= number:
            return
        await asyncio.sleep(0.01)


def test_what_is_due_is_called_in_order_and_what_was_cancelled_is_not():
    async def main() -> list[int]:
        timers, called = Timers(), list[int]()
        started = []
        for number in range(6):
            started.append(timers.call_later(0.03, lambda number=number: called.append(number)))
        for number in (0, 3):
            started[number].cancel()
        await until(called, 4)
        timers.call_later(0.001, lambda: called.append(6))  # another length
        await until(called, 5)
        timers.call_later(0.03, lambda: called.append(7))  # all are done: it begins anew
        await until(called, 6)
        return called

    assert asyncio.run(main()) == [1, 2, 4, 5, 6, 7]


def test_a_timer_is_not_called_before_it_is_due():
    async def main() -> float:
        loop, timers, called = asyncio.get_running_loop(), Timers(), list[float]()
        timers.call_later(0.02, lambda: None).cancel()  # the loop's timer runs for this one
        await asyncio.sleep(0.01)
        began = loop.time()
        timers.call_later(0.02, lambda: called.append(loop.time()))
        await until(called, 1)
        return called[0] - began

    assert asyncio.run(main()) >= 0.019


def test_a_call_that_fails_stops_no_other():
    async def main() -> list[str]:
        timers, called = Timers(), list[str]()
        asyncio.get_running_loop().set_exception_handler(lambda *_: called.append("failed"))
        timers.call_later(0.01, lambda: 1 / 0)
        timers.call_later(0.01, lambda: called.append("called"))
        await until(called, 2)
        return called

    assert asyncio.run(main()) == ["failed", "called"]


def test_what_was_cancelled_does_not_pile_up_behind_what_is_slow():
    def num_timers() -> int:
        return sum(isinstance(each, Timer) for each in gc.get_objects())

    async def main() -> tuple[int, list[int]]:
        timers, called, most = Timers(), list[int](), 0
        before = num_timers()  # of other tests' servers
        for number in range(2_000):
            timer = timers.call_later(0.2, lambda number=number: called.append(number))
            if number % 200 != 1:
                timer.cancel()
            if number % 100 == 0:
                most = max(most, num_timers() - before)
        await until(called, 10)
        return most, called

    most, called = asyncio.run(main())
    assert most <= LEAST_ROOM + 1
    assert called == list(range(1, 2_000, 200))


@pytest.mark.parametrize("timers", [None, Timers()])
def test_a_block_ends_in_time_without_an_error(timers):
    async def main() -> tuple[bool, bool]:
        with TimeLimit(0.01, timers) as late:
            await asyncio.sleep(20)
        with TimeLimit(0.01, timers) as early:
            pass
        await asyncio.sleep(0.05)
        return late.expired, early.expired

    assert asyncio.run(main()) == (True, False)


def test_a_loop_that_ended_leaves_nothing_to_the_next():
    timers, called = Timers(), list[str]()

    async def first() -> None:
        timers.call_later(0.01, lambda: called.append("first"))

    async def second() -> None:
        timers.call_later(0.01, lambda: called.append("second"))
        await until(called, 1)

    asyncio.run(first())
    asyncio.run(second())
    assert called == ["second"]
