"""Wake-ups between an event loop and threads: few, and none is lost."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import pytest

from edje.runtime.server.turns import Turns


class Counting:
    """A service as far as it is woken."""

    def __init__(self) -> None:
        self.num_woken = 0

    def wake(self) -> None:
        self.num_woken += 1


def test_a_turn_wakes_each_service_once():
    async def main() -> tuple[int, int]:
        turns, one, other = Turns(), Counting(), Counting()
        for _ in range(5):
            turns.begin(one)
        turns.begin(other)
        assert one.num_woken == 0
        await asyncio.sleep(0.01)
        turns.begin(one)
        await asyncio.sleep(0.01)
        return one.num_woken, other.num_woken

    assert asyncio.run(main()) == (2, 1)


def test_every_answer_of_every_thread_arrives():
    async def main() -> list[int]:
        turns = Turns()
        futures: list[Future[int]] = [Future() for _ in range(800)]

        def answer(first: int) -> None:
            for number in range(first, 800, 8):
                futures[number].set_result(number)

        threads = [threading.Thread(target=answer, args=(first,)) for first in range(8)]
        waiting = asyncio.gather(*(turns.result(future) for future in futures))
        await asyncio.sleep(0)
        for thread in threads:
            thread.start()
        found = await asyncio.wait_for(waiting, 20)
        for thread in threads:
            thread.join()
        return found

    assert asyncio.run(main()) == list(range(800))


def test_what_fails_what_is_done_and_what_is_cancelled():
    async def main() -> None:
        turns, done, fails, gone = Turns(), Future(), Future(), Future()
        done.set_result(7)
        assert await turns.result(done) == 7
        threading.Timer(0.01, fails.set_exception, (ValueError("no"),)).start()
        with pytest.raises(ValueError, match="no"):
            await turns.result(fails)
        threading.Timer(0.01, gone.cancel).start()
        with pytest.raises(asyncio.CancelledError):
            await turns.result(gone)

    asyncio.run(main())


def test_a_loop_that_ended_leaves_nothing_to_the_next():
    turns, late, soon = Turns(), Future[int](), Future[int]()

    async def first() -> None:
        turns.begin(Counting())
        task = asyncio.create_task(turns.result(late))
        await asyncio.sleep(0)
        task.cancel()

    async def second() -> int:
        threading.Timer(0.01, soon.set_result, (2,)).start()
        return await asyncio.wait_for(turns.result(soon), 10)

    asyncio.run(first())
    late.set_result(1)  # nobody waits for it any more
    assert asyncio.run(second()) == 2


def test_a_call_that_fails_is_told_to_the_loop_and_the_others_are_made():
    async def main() -> tuple[list[str], list[int]]:
        loop, told, called = asyncio.get_running_loop(), list[str](), list[int]()
        loop.set_exception_handler(lambda _, context: told.append(repr(context["exception"])))
        turns, futures = Turns(), [Future[int]() for _ in range(3)]
        turns.when_done(futures[0], lambda: called.append(0))
        turns.when_done(futures[1], lambda: 1 // 0)
        turns.when_done(futures[2], lambda: called.append(2))
        for future in futures:
            future.set_result(1)
        await asyncio.sleep(0.01)
        return told, called

    told, called = asyncio.run(main())
    assert called == [0, 2]
    assert told == ["ZeroDivisionError('integer division or modulo by zero')"]
