"""`edje serve` as a process of its own: what an operator starts, signals and scrapes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

START_S = 120.0  # a loaded machine is slow, not red


class ServeProcess:
    """Starts on entering, with any free port; killed on leaving where it still runs.

    Attributes:
        process: to signal and to wait for.
        url: where it listens.
        lines: what it wrote to stderr so far.
    """

    def __init__(self, engine: Path, store: Path, *options: str, env: dict[str, str] | None = None):
        command = [sys.executable, "-m", "edje", "serve", str(engine), "--store", str(store)]
        self._command = [*command, "--port", "0", *options]
        self._env = env
        self.lines: list[str] = []
        self.url = ""
        self._serving = threading.Event()

    def start(self) -> ServeProcess:
        """Start without waiting for the engine."""
        self.process = subprocess.Popen(
            self._command, stderr=subprocess.PIPE, text=True, env=self._env
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __enter__(self) -> ServeProcess:
        self.start()
        if not self._serving.wait(START_S) or not self.url:
            self.__exit__()
            raise AssertionError("it does not serve:\n" + "".join(self.lines))
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def wait(self, timeout_s: float = START_S) -> int:
        """Return the exit code."""
        return self.process.wait(timeout_s)

    def ask(
        self, path: str, body: Any = None, headers: Iterable[tuple[str, str]] = ()
    ) -> tuple[int, str]:
        """Return status and text of an answer; a body makes it a POST."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, dict(headers))
        try:
            with urllib.request.urlopen(request, timeout=START_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"serving .* at (http://\S+)", line)
            if found:
                self.url = found[1]
                self._serving.set()
        self._serving.set()
