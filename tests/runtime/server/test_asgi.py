"""The factory for other HTTP servers: run by a server that only gets its import path."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from edje.errors import RequestError
from edje.runtime.server.asgi import app

PATH = "edje.runtime.server.asgi:app"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


COMMANDS = {
    "uvicorn": ["--factory", PATH, "--port"],
    "granian": ["--interface", "asgi", "--factory", PATH, "--port"],
}


@pytest.mark.parametrize("server", COMMANDS)
def test_another_server_serves_it(
    server: str,
    tiny_engine: Path,
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if find_spec(server) is None:
        pytest.skip(f"{server} is not installed")
    monkeypatch.setenv("EDJE_ENGINE", str(tiny_engine))
    monkeypatch.setenv("EDJE_STORE", str(tiny_store))
    port = free_port()
    command = [sys.executable, "-m", server, *COMMANDS[server], str(port)]
    log = tmp_path / "log"
    with log.open("wb") as written:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=written, stdout=written)
    try:
        url = f"http://127.0.0.1:{port}"
        while not ready(url):
            assert process.poll() is None, log.read_text("utf-8")
            time.sleep(0.05)
        body = b'{"query": "a cat", "documents": ["img-1", "img-2"]}'
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v2/rerank", body)) as answer:
            assert answer.read().count(b'"relevance_score"') == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz") as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


def test_it_names_the_variables_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDJE_ENGINE", raising=False)
    monkeypatch.delenv("EDJE_STORE", raising=False)
    with pytest.raises(RequestError, match="EDJE_ENGINE and EDJE_STORE"):
        app()
