"""What `edje serve` does on SIGTERM: as a process, for that is what an orchestrator ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from http.client import HTTPException
from pathlib import Path

import pytest

from edje.perf.server_process import serving
from waiting import wait_until

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")


def test_sigterm_answers_what_was_accepted_and_exits_with_0(
    tiny_engine: Path, tiny_store: Path
) -> None:
    """Four clients ask without pause: until nobody listens, every answer is whole."""
    ids = [f"img-{i % 12}" for i in range(500)]
    found: list[tuple[int, int]] = []
    with serving(tiny_engine, tiny_store) as server:

        def ask() -> None:
            while True:
                try:
                    status, body = server.ask("/rerank", {"query": "a cat", "documents": ids})
                except HTTPException:  # an answer that was cut
                    found.append((0, 0))
                except OSError:  # refused, or reset before it was taken
                    return
                found.append((status, body.count(b'"relevance_score"')))

        asking = [threading.Thread(target=ask) for _ in range(4)]
        for thread in asking:
            thread.start()
        wait_until(lambda: len(found) >= 8)
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        for thread in asking:
            thread.join(30)
        assert "draining" in server.log_text()
    assert set(found) == {(200, len(ids))}


def test_it_is_not_ready_during_grace_but_serves(tiny_engine: Path, tiny_store: Path) -> None:
    with serving(tiny_engine, tiny_store, "--grace", "600") as server:
        server.send(signal.SIGTERM)
        while server.ask("/readyz")[0] == 200:
            time.sleep(0.01)
        assert server.ask("/livez")[0] == 200
        assert server.ask("/rerank", {"query": "a cat", "documents": ["img-1"]})[0] == 200
        server.send(signal.SIGTERM)  # the second signal ends it at once
        assert server.wait() == 0


PAST_OPENING = """
import os, signal, sys
from pathlib import Path
from edje.runtime.server import process
from edje.runtime.server.settings import Settings

def opening(*_, **__):
    os.kill(os.getpid(), signal.SIGHUP)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not reached", flush=True)

process.Host = opening
process.serve(Settings(Path("engine"), Path("store")), address="127.0.0.1", port=0)
"""


def test_signals_while_the_engine_opens() -> None:
    """The first process of a container has no default handler that would end it."""
    made = subprocess.run([sys.executable, "-c", PAST_OPENING], capture_output=True, text=True)
    assert made.stdout == "still here\n", made.stderr
    assert made.returncode == 128 + signal.SIGTERM
