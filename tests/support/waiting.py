"""Waiting for what other threads and processes do, and which threads there are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], what: str = "the condition to hold") -> None:
    """Poll `condition` for at most a minute: a loaded machine is slow, not red."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.005)


def stream_threads() -> set[threading.Thread]:
    """Return the threads of this process's host streams."""
    return {each for each in threading.enumerate() if each.name.startswith("edje-stream")}
