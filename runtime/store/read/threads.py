"""A few threads beside the caller's: copying with two takes half the time of copying with one."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from ....machine import usable_cores

# More would only take cores from the engine: a few threads copy as fast as the memory is.
MAX_THREADS = 4
# Waking a thread takes as long as copying this much.
BYTES_A_THREAD = 1 << 20


class CopyThreads:
    """Threads of one reader, started one by one as they are needed; a forked child makes its own.

    Attributes:
        most: threads that work at once, the caller's included.
    """

    def __init__(self) -> None:
        self.most = min(usable_cores(), MAX_THREADS)
        self._process, self._pool = os.getpid(), self._new_pool()

    def count_for(self, num_bytes: int) -> int:
        """Return how many threads copying so much pays for."""
        return max(1, min(self.most, num_bytes // BYTES_A_THREAD))

    def run(self, work: Callable[[], None], num_threads: int) -> None:
        """Run the same `work` on the calling thread and on others beside it; wait for all.

        A thread that has not begun when the caller is through is called off: what is to be done
        must come from something that all take from. The system may give fewer threads.

        Raises:
            BaseException: what any of them raised.
        """
        helpers: list[Future[None]] = []
        with suppress(RuntimeError):  # the system or a closing interpreter gives no threads
            for _ in range(num_threads - 1):
                helpers.append(self._own_pool().submit(work))
        try:
            work()
        finally:  # nobody may write into the caller's buffers after this
            errors = [None if helper.cancel() else helper.exception() for helper in helpers]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """Let the threads end; waits for none."""
        self._pool.shutdown(wait=False)

    def _own_pool(self) -> ThreadPoolExecutor:
        if self._process != os.getpid():  # the parent's threads are not here
            self._process, self._pool = os.getpid(), self._new_pool()
        return self._pool

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max(1, self.most - 1), "edje-read")
