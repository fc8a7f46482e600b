"""Threads that wait for work of a reader: a `ThreadPoolExecutor` that takes less time to begin."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Lock, Thread

Work = Callable[[], None]


class Task:
    """Work that one thread does, unless whoever asked for it has meanwhile finished without."""

    def __init__(self, work: Work):
        self._work = work
        self._claim, self._running = Lock(), Lock()
        self._running.acquire()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do the work if it is still wanted. What goes wrong is kept for `finish`."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._running.release()

    def finish(self) -> BaseException | None:
        """Call the work off, or wait until it is done; return what went wrong. Called once."""
        if not self._claim.acquire(blocking=False):
            self._running.acquire()
        return self._error


class Helpers:
    """Up to `most` threads, started one by one as they are needed; they end with `close`."""

    def __init__(self, most: int):
        self._most, self._num_threads = most, 0
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._lock = Lock()

    def ask(self, count: int, work: Work) -> list[Task]:
        """Let `count` threads, or as many as there may be, do the work beside the caller.

        The caller must `finish` every task. The system may give fewer threads, or none.
        """
        count = min(count, self._most)
        if self._num_threads < count:
            count = self._start(count)
        tasks = [Task(work) for _ in range(count)]
        for task in tasks:
            self._tasks.put(task)
        return tasks

    def close(self) -> None:
        """Let the threads end when they have nothing to do. Calling it twice is allowed."""
        self._tasks.put(None)

    def __del__(self) -> None:
        self.close()

    def _start(self, count: int) -> int:
        """Start threads until there are `count`; return how many there are."""
        with self._lock, suppress(RuntimeError):  # the system or the interpreter gives no threads
            while self._num_threads < count:
                # They hold nothing but the queue, and a closing interpreter waits for none of them.
                Thread(None, _serve, "edje-read", (self._tasks,), daemon=True).start()
                self._num_threads += 1
        return min(count, self._num_threads)


def _serve(tasks: SimpleQueue[Task | None]) -> None:
    """Do tasks until the end is there, and leave that for the next thread."""
    while (task := tasks.get()) is not None:
        task.run()
        del task  # and with it the caller's buffers
    tasks.put(None)
