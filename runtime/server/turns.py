"""Between the event loop and the threads that score: a wake-up each way a turn, not a request.

Waking a thread costs more than most of what the front does for a request, and one that is woken
too early only waits for the interpreter's lock.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from .answers import Answer
from .contract import Service


class Turns:
    """Gathers what one turn of an event loop submits, and what one batch answers.

    One loop at a time; what belonged to an earlier one is forgotten, as it has ended.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begin_anew()

    def begin(self, service: Service, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Let a service begin, with all that this turn of the loop will have submitted to it.

        Args:
            loop: that runs; None: ask for it, which takes a system call.
        """
        loop = self._of_loop(loop)
        if not self._submitted:
            loop.call_soon(self._begin)
        if service not in self._submitted:  # a reload may come between
            self._submitted.append(service)

    def when_done(
        self,
        future: Future[Answer],
        call: Callable[[], object],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Call from the loop once a future of any thread is done; what it raises is logged."""
        loop = self._of_loop(loop)
        future.add_done_callback(partial(self._arrive, loop, call))

    async def result(self, future: Future[Answer]) -> Answer:
        """Return what a future of any thread gives, as `asyncio.wrap_future` does.

        Unlike there, cancelling the task leaves the future alone.

        Raises:
            asyncio.CancelledError: the task or the future was cancelled.
            Exception: what the future failed with.
        """
        if not future.done():
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()
            self.when_done(future, partial(_wake, waiter), loop)
            await waiter
        if future.cancelled():
            raise asyncio.CancelledError
        return future.result()

    def _begin_anew(self) -> None:
        self._submitted: list[Service] = []
        self._answered: deque[Callable[[], object]] = deque()
        self._called = False

    def _of_loop(self, loop: asyncio.AbstractEventLoop | None) -> asyncio.AbstractEventLoop:
        if loop is None:
            loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._begin_anew()
        return loop

    def _begin(self) -> None:
        submitted, self._submitted = self._submitted, []
        for service in submitted:
            service.wake()

    def _arrive(
        self, loop: asyncio.AbstractEventLoop, call: Callable[[], object], _: object
    ) -> None:
        """Learn of an answer, on the thread that gives it."""
        self._answered.append(call)
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(self._deliver, loop)

    def _deliver(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let the requests go on that were answered."""
        self._called = False  # first: what comes from now on calls again
        while self._answered:
            call = self._answered.popleft()
            try:
                call()
            except Exception as error:  # the others are to be answered all the same
                loop.call_exception_handler({"message": f"{call} failed", "exception": error})


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
