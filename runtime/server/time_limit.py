"""A block that may take so long and no longer."""

from __future__ import annotations

import asyncio


class TimeLimit:
    """A block that ends after some seconds, without an error; `expired` tells.

    As `asyncio.timeout`, which Python 3.10 lacks, for a third of its cost.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self.expired = False

    def __enter__(self) -> TimeLimit:
        task = asyncio.current_task()
        assert task is not None

        def expire() -> None:
            self.expired = True
            task.cancel()

        self._timer = asyncio.get_running_loop().call_later(self._seconds, expire)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._timer.cancel()
        return self.expired and kind is asyncio.CancelledError
