"""One JSON line an answered request, written by a thread: a full disk never stops a request."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timezone
from io import FileIO, RawIOBase
from typing import Any, BinaryIO

import msgspec

FLUSH_EVERY_S = 0.05  # one thread switch for the lines of so long, not one a line
_encode = msgspec.json.Encoder().encode
MAX_LINES = 10_000  # that may wait for a slow disk; what comes then is lost, and counted


class JsonLog:
    """Lines that wait to be written; `write` never blocks and never fails.

    Attributes:
        on_lost: called with the number of lines that could not be written.
    """

    def __init__(self, stream: BinaryIO | None = None):
        """Start the thread; `stream`: of bytes; None: stderr.

        Not `sys.stderr`: what it cannot write it keeps, and ends the process with another exit
        code, or with an abort where a thread still waits for a reader.
        """
        self._stream: RawIOBase | BinaryIO = stream or FileIO(2, "w", closefd=False)
        self.on_lost: Callable[[int], None] = lambda _: None
        self._lines: deque[dict[str, Any] | str] = deque()
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="edje-log", daemon=True)
        self._thread.start()

    def write(self, event: str, **fields: Any) -> None:
        """Let one line wait; fields that are None are left out."""
        if len(self._lines) >= MAX_LINES:
            self.on_lost(1)
            return
        self._lines.append({"time": time.time(), "event": event, **fields})
        if not self._wake.is_set():
            self._wake.set()

    def say(self, message: str) -> None:
        """Let a line wait that is for people: `edje: message`, no JSON."""
        self._lines.append(f"edje: {message}\n")
        self._wake.set()

    def close(self) -> None:
        """Write what waits and end the thread."""
        self._closed = True
        self._wake.set()
        self._thread.join(5.0)

    def take_over(self) -> None:
        """Let what libraries log become lines too: they would write to stderr, and may block."""
        logging.getLogger().addHandler(_Forwarding(self))

    def _work(self) -> None:
        while not self._closed:
            self._wake.wait()
            if not self._closed:
                time.sleep(FLUSH_EVERY_S)
            self._wake.clear()
            self._write_waiting()
        self._write_waiting()  # what came while the last lines were written

    def _write_waiting(self) -> None:
        lines = []
        second, written = -1, ""
        while self._lines:
            fields = self._lines.popleft()
            if isinstance(fields, str):
                lines.append(fields.encode("utf-8", "backslashreplace"))
                continue
            told = {name: value for name, value in fields.items() if value is not None}
            seconds = told["time"]
            if int(seconds) != second:  # most lines are of the last one's second
                second = int(seconds)
                written = datetime.fromtimestamp(second, timezone.utc).isoformat()[:-6]
            told["time"] = f"{written}.{int((seconds - second) * 1e3):03d}+00:00"
            lines.append(_line(told))
        if not lines:
            return
        try:
            left = memoryview(b"".join(lines))
            while left:
                left = left[self._stream.write(left) or 0 :]
            self._stream.flush()
        except (OSError, ValueError):  # full, closed, or nobody reads
            self.on_lost(len(lines))


def _line(fields: dict[str, Any]) -> bytes:
    """Return a line of JSON; what is no text or no JSON is told as Python writes it."""
    try:
        return _encode(fields) + b"\n"
    except (ValueError, TypeError, OverflowError):  # half a character; no JSON
        text = json.dumps(fields, ensure_ascii=False, default=str) + "\n"
        return text.encode("utf-8", "backslashreplace")


class _Forwarding(logging.Handler):
    """Turns the records of `logging` into lines."""

    def __init__(self, log: JsonLog):
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Let one record wait."""
        trace = None
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
        told = {"logger": record.name, "level": record.levelname.lower(), "trace": trace}
        self._log.write("library", message=record.getMessage(), **told)
