"""One JSON line an answered request, written by a thread: a full disk never stops a request."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, BinaryIO

GATHER_S = 0.05  # one thread switch for the lines of so long, not one a line
MAX_LINES = 10_000  # that may wait for a slow disk; what comes then is lost, and counted


class JsonLog:
    """Lines that wait to be written; `write` never blocks and never fails.

    Attributes:
        on_lost: called with the number of lines that could not be written.
    """

    def __init__(self, stream: BinaryIO | None = None):
        """Start the thread; `stream`: of bytes; None: stderr."""
        self._stream = stream if stream is not None else sys.stderr.buffer
        self.on_lost: Callable[[int], None] = lambda _: None
        self._lines: deque[dict[str, Any]] = deque()
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="edje-log", daemon=True)
        self._thread.start()

    def write(self, event: str, **fields: Any) -> None:
        """Let one line wait; fields that are None are left out."""
        if len(self._lines) >= MAX_LINES:
            self.on_lost(1)
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._lines.append({"time": now, "event": event, **fields})
        if not self._wake.is_set():
            self._wake.set()

    def close(self) -> None:
        """Write what waits and end the thread."""
        self._closed = True
        self._wake.set()
        self._thread.join(5.0)

    def _work(self) -> None:
        while not self._closed:
            self._wake.wait()
            if not self._closed:
                time.sleep(GATHER_S)
            self._wake.clear()
            self._write_waiting()
        self._write_waiting()  # what came while the last lines were written

    def _write_waiting(self) -> None:
        lines = []
        while self._lines:
            fields = self._lines.popleft()
            told = {name: value for name, value in fields.items() if value is not None}
            lines.append(json.dumps(told, ensure_ascii=False) + "\n")
        if not lines:
            return
        try:
            self._stream.write("".join(lines).encode("utf-8", "backslashreplace"))
            self._stream.flush()
        except (OSError, ValueError):  # full, closed, or nobody reads
            self.on_lost(len(lines))
