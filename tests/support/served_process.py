"""`edje serve` as a process of its own: for signals, exit codes, and what a full disk does."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

MOODY = Path(__file__).with_name("moody_backend.py")


@dataclass(frozen=True)
class Served:
    """A process that serves."""

    process: subprocess.Popen[bytes]
    port: int
    admin_port: int

    def ask(
        self, path: str, body: Any = None, *, admin: bool = False, timeout: float = 20.0
    ) -> tuple[int, bytes]:
        """Send one request on a connection of its own; return status and body."""
        port = self.admin_port if admin else self.port
        connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
        try:
            raw = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, raw)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """The sum of a metric's values."""
        lines = self.ask("/metrics")[1].decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def end(self, how: signal.Signals = signal.SIGTERM, timeout: float = 20.0) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(how)
        return self.process.wait(timeout)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def served(
    engine: Path, store: Path, *options: str, stderr: Any = subprocess.DEVNULL,
    command: Sequence[str] = (sys.executable, str(MOODY)), environ: Mapping[str, str] | None = None,
) -> Iterator[Served]:  # fmt: skip
    """Start `edje serve` and yield it once it is ready; it is killed at the end if it still runs.

    Args:
        stderr: where its log goes.
        command: what to run; by default `edje` with the moody backend.
    """
    port, admin_port = free_ports(2)
    words = [*command, "serve", str(engine), "--store", str(store)]
    ports = ["--port", str(port), "--admin-port", str(admin_port)]
    process = subprocess.Popen(
        [*words, *ports, *options], stderr=stderr, stdout=subprocess.DEVNULL, env=environ
    )
    found = Served(process, port, admin_port)
    try:
        wait_until_ready(found)
        yield found
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_until_ready(found: Served, seconds: float = 30.0) -> None:
    """Wait for `/readyz` to say yes."""
    until = time.monotonic() + seconds
    while True:
        assert found.process.poll() is None, f"it ended with {found.process.returncode}"
        try:
            if found.ask("/readyz")[0] == 200:
                return
        except OSError:
            pass
        assert time.monotonic() < until, "it is not ready in time"
        time.sleep(0.05)
