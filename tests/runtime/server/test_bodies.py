"""Bodies in memory: each is limited, and all of them together."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from edje.errors import RequestError
from edje.runtime.server.settings import Settings
from running_server import Running, running, settings_of
from waiting import wait_until

LARGE = 500_000
BUDGET = 1_200_000  # two large ones, and small ones beside them


@pytest.fixture(scope="module")
def server(tiny_engine: Path, tiny_store: Path) -> Iterator[Running]:
    settings = settings_of(
        tiny_engine, tiny_store, max_body_bytes=2 * LARGE, max_bodies_bytes=BUDGET
    )
    with running(settings) as started:
        yield started


def held(server: Running) -> float:
    return server.metric("edje_body_bytes")


def begin(server: Running) -> socket.socket:
    """Send all of a large body but its end."""
    opened = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST /rerank HTTP/1.1\r\nhost: x\r\ncontent-length: {LARGE + 1}\r\n\r\n"
    opened.sendall(head.encode() + b" " * LARGE)
    return opened


def large_body() -> bytes:
    return json.dumps({"query": "red", "documents": ["img-1"]}).encode().ljust(LARGE)


def test_more_bodies_than_fit_are_refused_and_small_ones_are_not(server: Running) -> None:
    with closing(begin(server)) as first, closing(begin(server)):
        wait_until(lambda: held(server) >= 2 * LARGE)
        refused = server.ask("/rerank", large_body())
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.headers["connection"] == "close"
        assert server.metric('edje_refusals_total{reason="memory"}') == 1
        assert server.ask("/rerank", large_body().rstrip()).status == 200
        first.sendall(b"}")  # no JSON: refused, and no more held
        assert first.recv(100).startswith(b"HTTP/1.1 400 ")
        assert server.ask("/rerank", large_body()).status == 200
    wait_until(lambda: held(server) == 0)  # the second one left in the middle


def test_what_was_answered_or_refused_is_no_more_held(server: Running) -> None:
    bodies = (large_body(), b"", b"[" * 1000, b"x" * (2 * LARGE + 1))
    assert [server.ask("/rerank", body).status for body in bodies] == [200, 400, 400, 413]
    wait_until(lambda: held(server) == 0)
    assert server.ask("/rerank", large_body()).status == 200


def test_a_body_may_be_as_large_as_all_of_them() -> None:
    settings = Settings(Path("e"), Path("s"), max_body_bytes=100, max_bodies_bytes=99)
    with pytest.raises(RequestError, match="max_bodies_bytes is 99, expected 100"):
        settings.check()
