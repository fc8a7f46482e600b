"""`edje serve` as a process to be measured, and the requests that are sent to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Float32
from ..errors import EdjeError
from ..runtime.reranker import Reranker
from .harness import scores_in_order

ENGINE, STORE = "engine", "scenes.store"  # in the folder that `make demo` writes
EDJE = (sys.executable, "-m", "edje")
START_S = 120.0


@dataclass(frozen=True, slots=True)
class Known:
    """What every request must answer: the score of each image for some queries.

    Attributes:
        ids: of the store, in its order.
        scores: raw logits float32 [N] of every query.
    """

    ids: Sequence[str]
    scores: Mapping[str, Float32]

    @classmethod
    def of(cls, engine: Path, store: Path, queries: Sequence[str]) -> Known:
        """Score the whole store for some queries, without a server."""
        with Reranker.open(engine, store=store) as reranker:
            ids = list(reranker.store.ids())
            return cls(ids, {query: scores_in_order(reranker, query) for query in queries})

    def wrong(self, query: str, picked: Sequence[int], found: Float32, tolerance: float) -> bool:
        """Whether scores (float32 [N], in the order of `picked`) are not those of the images."""
        expected = self.scores[query][np.asarray(picked)]
        return found.shape != expected.shape or not np.allclose(found, expected, atol=tolerance)


def read_queries(demo: Path, number: int) -> list[str]:
    """Return the first queries of the demo."""
    with (demo / "queries.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["query"] for line, _ in zip(lines, range(number), strict=False)]


class ServerProcess:
    """A server that runs.

    Attributes:
        pid: its process.
        port, admin_port: where it listens on loopback.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, admin_port: int):
        self._process = process
        self.pid, self.port, self.admin_port = process.pid, port, admin_port

    def ask(
        self, path: str, body: Any = None, *, admin: bool = False, timeout_s: float = 60.0
    ) -> tuple[int, bytes]:
        """Send one request on a connection of its own; return status and body."""
        port = self.admin_port if admin else self.port
        connection = HTTPConnection("127.0.0.1", port, timeout=timeout_s)
        try:
            raw = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, raw)
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

    def end(self) -> int:
        """End it as an orchestrator does; return its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)

    @property
    def has_ended(self) -> bool:
        """Whether it runs no more."""
        return self._process.poll() is not None


@contextmanager
def serving(
    engine: Path, store: Path, *options: str, log: Path, command: Sequence[str] = EDJE
) -> Iterator[ServerProcess]:
    """Serve until the block ends.

    Args:
        options: more words for `edje serve`.
        log: file for what it writes to stderr.
        command: what to run in place of `edje`.

    Raises:
        EdjeError: it does not come up.
    """
    port, admin_port = _free_ports(2)
    ports = ["--port", str(port), "--admin-port", str(admin_port)]
    words = [*command, "serve", str(engine), "--store", str(store), *ports, *options]
    with log.open("wb") as stream:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=stream)
    server = ServerProcess(process, port, admin_port)
    try:
        until = time.monotonic() + START_S
        while not _is_ready(server):
            if server.has_ended or time.monotonic() > until:
                raise EdjeError(f"the server does not come up:\n{log.read_text()[-2000:]}")
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
