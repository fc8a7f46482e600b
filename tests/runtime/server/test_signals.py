"""What `edje serve` does on SIGTERM: as a process, for that is what an orchestrator ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from serve_process import ServeProcess

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")


def test_sigterm_answers_what_was_accepted_and_exits_with_0(
    tiny_engine: Path, tiny_store: Path
) -> None:
    ids = [f"img-{i % 12}" for i in range(6000)]
    with ServeProcess(tiny_engine, tiny_store) as server:
        answers: list[tuple[int, str]] = []
        asking = threading.Thread(
            target=lambda: answers.append(
                server.ask("/rerank", {"query": "a cat", "documents": ids})
            )
        )
        asking.start()
        while "edje_requests_in_flight 1" not in server.ask("/metrics")[1]:
            assert asking.is_alive(), "the request ended before the signal: ask for more"
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        asking.join()
    ((status, body),) = answers
    assert status == 200
    assert body.count('"relevance_score"') == len(ids)
    assert "draining" in "".join(server.lines)


def test_it_is_not_ready_during_grace_but_serves(tiny_engine: Path, tiny_store: Path) -> None:
    with ServeProcess(tiny_engine, tiny_store, "--grace", "600") as server:
        server.process.send_signal(signal.SIGTERM)
        while server.ask("/readyz")[0] == 200:
            time.sleep(0.01)
        assert server.ask("/livez")[0] == 200
        assert server.ask("/rerank", {"query": "a cat", "documents": ["img-1"]})[0] == 200
        server.process.send_signal(signal.SIGTERM)  # the second signal ends it at once
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
