"""Limits of time: many of one length for the price of one, and blocks that may take so long."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol


class Cancellable(Protocol):
    """What `call_later` gives."""

    def cancel(self) -> None:
        """Let it not be called."""


Loop = asyncio.AbstractEventLoop
LEAST_ROOM = 64  # timers that may wait before those of them go that were cancelled


class Timer:
    """One call that is due."""

    __slots__ = ("call", "due")

    def __init__(self, due: float, call: Callable[[], object]):
        self.due = due
        self.call: Callable[[], object] | None = call

    def cancel(self) -> None:
        """Let it not be called."""
        self.call = None


class _Line:
    """Timers of one length, the earliest first; `room`: how many before the cancelled ones go."""

    __slots__ = ("room", "timers")

    def __init__(self) -> None:
        self.timers: deque[Timer] = deque()
        self.room = LEAST_ROOM

    def clear_out(self) -> None:
        """Drop what was cancelled; the first one stays: for it the loop's timer runs."""
        first, *others = self.timers
        self.timers.clear()
        self.timers.append(first)
        self.timers.extend(timer for timer in others if timer.call is not None)
        self.room = max(LEAST_ROOM, 2 * len(self.timers))


class Timers:
    """`call_later` of one event loop for a few lengths of time, almost all of them cancelled.

    Timers of one length are due in the order they were started, so that a queue and one timer of
    the loop do; the loop's own cost more than reading a request's body. One loop at a time; the
    timers of an earlier one are forgotten, as it has ended.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lines: dict[float, _Line] = {}

    def call_later(
        self, seconds: float, call: Callable[[], object], loop: Loop | None = None
    ) -> Timer:
        """Call `call` in so many seconds, one of a few lengths that come again and again.

        Args:
            loop: that runs; None: ask for it, which takes a system call.
        """
        if loop is None:
            loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._lines = loop, {}
        line = self._lines.get(seconds)
        if line is None:
            line = self._lines[seconds] = _Line()
        timers, timer = line.timers, Timer(loop.time() + seconds, call)
        if not timers:
            loop.call_later(seconds, self._due, loop, timers)
        timers.append(timer)
        if len(timers) > line.room:
            line.clear_out()
        return timer

    def _due(self, loop: asyncio.AbstractEventLoop, queue: deque[Timer]) -> None:
        """Call what is due, and come again for the next."""
        now = loop.time()
        try:
            while queue and (queue[0].call is None or queue[0].due <= now):
                call = queue.popleft().call
                if call is not None:
                    call()
        finally:
            if queue:
                loop.call_later(max(0.0, queue[0].due - now), self._due, loop, queue)


class TimeLimit:
    """A block that ends after some seconds, without an error; `expired` tells.

    As `asyncio.timeout`, which Python 3.10 lacks, for a third of its cost.
    """

    def __init__(self, seconds: float, timers: Timers | None = None):
        """`timers`: to use, where limits of this length come again and again."""
        self._seconds, self._timers = seconds, timers
        self.expired = False

    def __enter__(self) -> TimeLimit:
        task = asyncio.current_task()
        assert task is not None

        def expire() -> None:
            self.expired = True
            task.cancel()

        call_later: Callable[..., Cancellable] = (
            asyncio.get_running_loop() if self._timers is None else self._timers
        ).call_later
        self._timer = call_later(self._seconds, expire)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._timer.cancel()
        return self.expired and kind is asyncio.CancelledError
