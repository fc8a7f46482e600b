"""`edje serve` as a process of its own: what an operator starts, signals, scrapes and measures.

Needs no package beside `edje` itself: tests that run without any use it, too.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO, Any

from ..errors import EdjeError

EDJE = (sys.executable, "-m", "edje")
START_S = 120.0  # a loaded machine is slow, not red


class ServerProcess:
    """A server that runs.

    Attributes:
        pid: its process.
        port, admin_port: where it listens on loopback.
        log: file of what it writes to stderr; empty where that goes elsewhere.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, admin_port: int, log: Path):
        self._process = process
        self.pid, self.port, self.admin_port, self.log = process.pid, port, admin_port, log

    @property
    def url(self) -> str:
        """Where clients ask."""
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        admin: bool = False,
        timeout_s: float = 60.0,
    ) -> tuple[int, bytes]:
        """Send one request on a connection of its own; return status and body.

        Args:
            body: makes it a POST; sent as JSON unless it is bytes.
            admin: ask the admin port.

        Raises:
            OSError, HTTPException: no answer.
        """
        port = self.admin_port if admin else self.port
        connection = HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        try:
            raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, raw, dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """Return all metrics by name and labels, as Prometheus reads them."""
        text = self.ask("/metrics")[1].decode()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def cpu_s(self) -> float:
        """Return the CPU seconds that the process has used, all its threads."""
        words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def holds(self) -> dict[str, float]:
        """Return what the process holds now: MB of memory, open files, threads."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        return {
            "rss_mb": int(fields["VmRSS"].split()[0]) / 1024,
            "fds": len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": int(fields["Threads"]),
        }

    def log_text(self) -> str:
        """Return what it has written to stderr so far."""
        return self.log.read_text("utf-8", errors="replace")

    def send(self, how: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(how)

    def wait(self, timeout_s: float = START_S) -> int:
        """Return the exit code once it has ended."""
        return self._process.wait(timeout_s)

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it as an orchestrator does; return its exit code."""
        self.send(how)
        return self.wait()

    @property
    def has_ended(self) -> bool:
        """Whether it runs no more."""
        return self._process.poll() is not None


@contextmanager
def serving(
    engine: Path,
    store: Path,
    *options: str,
    command: Sequence[str] = EDJE,
    environ: Mapping[str, str] | None = None,
    stderr: IO[bytes] | int | None = None,
    scratch: Path | None = None,
    has_admin: bool = True,
) -> Iterator[ServerProcess]:
    """Serve until the block ends; ready when it begins, killed where it still runs then.

    Args:
        options: more words for `edje serve`.
        command: what to run in place of `edje`.
        environ: variables in place of this process's.
        stderr: where its log goes; None: into a file that `ServerProcess.log_text` reads.
        scratch: folder of that file; None: the system's for temporary files.
        has_admin: whether it has an admin port; on Ray there is none.

    Raises:
        EdjeError: it does not come up; with the end of its log.
    """
    port, admin_port = _free_ports(2)
    ports = ["--port", str(port)]
    if has_admin:
        ports += ["--admin-port", str(admin_port)]
    words = [*command, "serve", str(engine), "--store", str(store), *ports, *options]
    with tempfile.NamedTemporaryFile(prefix="edje-log-", dir=scratch) as log:
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=log if stderr is None else stderr, env=environ
        )
        server = ServerProcess(process, port, admin_port, Path(log.name))
        try:
            until = time.monotonic() + START_S
            while not _is_ready(server):
                if server.has_ended or time.monotonic() > until:
                    raise EdjeError(f"the server does not come up:\n{server.log_text()[-2000:]}")
                time.sleep(0.05)
            yield server
        finally:
            if not server.has_ended:
                process.kill()
            process.wait()


def _is_ready(server: ServerProcess) -> bool:
    with suppress(OSError, HTTPException):
        return server.ask("/readyz")[0] == 200
    return False


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
