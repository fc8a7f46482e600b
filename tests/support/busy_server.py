"""A server that has more to do than it admits. Needs the standard library alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

REFUSES_S = 60.0  # a loaded machine is slow, not red
TRIES = 100
E = TypeVar("E", bound=BaseException)


@contextmanager
def busy(ask: Callable[[], int], callers: int = 4) -> Iterator[None]:
    """Let `callers` threads ask again and again while the block runs.

    The block begins once one of them was refused.

    Args:
        ask: sends a large request and returns the status of its answer.
    """
    ending, refused = threading.Event(), threading.Event()

    def call() -> None:
        while not ending.is_set():
            if ask() == 429:
                refused.set()
                ending.wait(0.005)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        assert refused.wait(REFUSES_S), "the server admits whatever comes"
        yield
    finally:
        ending.set()
        for thread in threads:
            thread.join()


def until_raised(call: Callable[[], object], kind: type[E] | tuple[type[E], ...]) -> E:
    """Call until it raises `kind`: between two requests even a busy server admits one."""
    for _ in range(TRIES):
        try:
            call()
        except kind as raised:
            return raised
    raise AssertionError(f"{TRIES} calls, and none raised {kind}")
