"""What goes over a connection: an answer in one piece, whatever the kind of answer."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPResponse

import pytest

from edje.runtime.server import connections
from edje.runtime.server.connections import Joined
from running_server import Running, running, settings_of

BODY = b'{"query": "red", "documents": ["img-1", "img-2"]}'
PLAIN = b"POST /rerank HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(BODY)
CHUNKED = b"POST /rerank HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
LIVE = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"


@contextmanager
def connected(server: Running) -> Iterator[socket.socket]:
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=20)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield client


def answer(client: socket.socket, method: str = "POST") -> tuple[int, dict[str, str], bytes]:
    """Read one answer; what follows it must not have come yet."""
    response = HTTPResponse(client, method=method)
    response.begin()
    body = response.read()
    return response.status, {k.lower(): v for k, v in response.getheaders()}, body


def answers(client: socket.socket, number: int) -> list[tuple[int, bytes]]:
    """Read several answers that come without pause."""
    found = []
    file = client.makefile("rb")
    for _ in range(number):
        status = int(file.readline().split()[1])
        length = 0
        while (line := file.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        found.append((status, file.read(length)))
    return found


class Pieces(asyncio.Protocol):
    """Keeps what arrives."""

    def __init__(self) -> None:
        self.data = b""

    def data_received(self, data: bytes) -> None:
        self.data += data


def test_heads_go_with_what_follows_and_all_arrives_in_order():
    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        there, here = socket.socketpair()
        _, reader = await loop.create_connection(Pieces, sock=there)
        plain, _ = await loop.create_connection(asyncio.Protocol, sock=here)
        transport = Joined(plain, loop)
        transport.write(b"HTTP/1.1 200 a\r\n")
        assert transport.get_write_buffer_size() == 0
        transport.write(b"body")
        transport.write(b"more")
        transport.write(b"HTTP/1.1 204 b\r\n")  # nothing follows
        await asyncio.sleep(0.01)
        transport.write(b"HTTP/1.1 100 c\r\n")
        transport.write(b"HTTP/1.1 200 d\r\n")
        transport.write(b"")
        transport.write(b"HTTP/1.1 200 e\r\n")
        transport.close()
        assert transport.is_closing()
        while not reader.data.endswith(b" e\r\n"):
            await asyncio.sleep(0.001)
        return reader.data

    assert asyncio.run(asyncio.wait_for(main(), 20)) == (
        b"HTTP/1.1 200 a\r\nbodymoreHTTP/1.1 204 b\r\n"
        b"HTTP/1.1 100 c\r\nHTTP/1.1 200 d\r\nHTTP/1.1 200 e\r\n"
    )


def test_an_answer_without_a_body_is_sent(server: Running):
    assert server.ask("/livez", method="HEAD").status == 405
    assert server.ask("/docs", method="HEAD").status == 405


def test_a_client_that_waits_before_it_sends_its_body_is_told_to_go_on(server: Running):
    body = b'{"query": "red", "documents": ["img-1"]}'
    head = b"POST /rerank HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(head % len(body))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
        client.sendall(body)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_of_all_kinds_are_answered_in_order(server: Running):
    wrong = BODY.replace(b"img-1", b"nobody")
    refused = b"POST /rerank HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(wrong)
    with connected(server) as client:
        client.sendall(PLAIN + BODY + PLAIN + BODY + LIVE + refused + wrong + PLAIN + BODY)
        found = answers(client, 5)
    assert [status for status, _ in found] == [200, 200, 200, 422, 200]
    assert found[2][1] == b'{"live":true}'
    assert b"nobody" in found[3][1]
    assert all(b'"results"' in found[at][1] for at in (0, 1, 4))


@pytest.mark.parametrize("pause", [0.0, 0.02])
@pytest.mark.parametrize("longest", [connections.BODY_AFTER_HEAD_S, 0.01])
def test_a_body_in_parts_is_served_however_slowly_it_comes(
    server: Running, monkeypatch: pytest.MonkeyPatch, pause: float, longest: float
):
    monkeypatch.setattr(connections, "BODY_AFTER_HEAD_S", longest)
    with connected(server) as client:
        for _ in range(2):
            for part in (PLAIN[:20], PLAIN[20:], BODY[:10], BODY[10:30], BODY[30:]):
                client.sendall(part)
                time.sleep(pause)
            status, headers, body = answer(client)
            assert status == 200
            assert b'"results"' in body
            assert headers["content-type"] == "application/json"
    assert server.metric("edje_body_bytes") == 0


def test_a_chunked_body_is_served_at_once_or_in_parts(server: Running):
    chunks = b"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (9, BODY[:9], len(BODY) - 9, BODY[9:])
    with connected(server) as client:
        for cut in (len(chunks), 8, 1):
            client.sendall(CHUNKED + chunks[:cut])
            time.sleep(0.02)
            client.sendall(chunks[cut:])
            assert answer(client)[0] == 200


def test_every_way_through_the_server_gives_the_same_headers(server: Running):
    ways = {
        "direct": PLAIN + BODY,
        "chunked": CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
        "query string": PLAIN.replace(b"/rerank", b"/rerank?a=b") + BODY,
        "expect": PLAIN.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n") + BODY,
    }
    found = {}
    for way, request in ways.items():
        with connected(server) as client:
            client.sendall(request)
            status, headers, _ = answer(client)
            assert status == 200
            found[way] = sorted(headers)
    assert all(headers == found["direct"] for headers in found.values()), found
    assert "server" not in found["direct"] or "date" in found["direct"]


@pytest.mark.parametrize("lines", [b"HTTP/1.1\r\nconnection: close", b"HTTP/1.0"])
def test_a_connection_ends_with_its_answer_where_the_client_wants_that(server: Running, lines):
    with connected(server) as client:
        client.sendall(PLAIN.replace(b"HTTP/1.1", lines) + BODY)
        status, headers, _ = answer(client)
        assert (status, headers["connection"]) == (200, "close")
        assert client.recv(1) == b""


def test_what_follows_a_request_and_is_no_http_is_400_after_its_answer(server: Running):
    with connected(server) as client:
        client.sendall(PLAIN + BODY)
        assert answer(client)[0] == 200
        client.sendall(b"nonsense\r\n\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


def test_a_client_that_leaves_within_its_body_is_counted_and_its_bytes_are_not(server: Running):
    left = server.metric("edje_disconnects_total")
    with connected(server) as client:
        client.sendall(PLAIN + BODY[:-1])
        until = time.monotonic() + 20
        while server.metric("edje_body_bytes") < len(BODY) - 1:
            assert time.monotonic() < until
    while server.metric("edje_disconnects_total") == left:
        assert time.monotonic() < until
    assert server.metric("edje_body_bytes") == 0


def test_a_server_that_ends_serves_a_request_whose_body_is_on_its_way(tiny_engine, tiny_store):
    with ExitStack() as stack:
        server = stack.enter_context(running(settings_of(tiny_engine, tiny_store)))
        client = stack.enter_context(connected(server))
        client.sendall(PLAIN)
        server.ask("/livez")  # the head was read by now
        ending = threading.Thread(target=stack.pop_all().close)
        closing_client = socket.socket(fileno=client.detach())
        ending.start()
        time.sleep(0.3)
        with closing(closing_client):
            closing_client.settimeout(20)
            closing_client.sendall(BODY)
            assert answer(closing_client)[0] == 200
        ending.join(20)


def test_an_answered_request_leaves_nothing_to_the_garbage_collector(server: Running):
    with connected(server) as client:

        def ask(number: int) -> None:
            for _ in range(number):
                client.sendall(PLAIN + BODY)
                assert answers(client, 1)[0][0] == 200

        ask(20)
        gc.collect()
        gc.disable()
        try:
            ask(100)
            assert gc.collect() < 100
        finally:
            gc.enable()


def test_a_connection_that_asks_for_nothing_is_closed_and_one_that_asks_is_not(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    seconds = property(lambda _: 1.5, lambda *_: None)
    monkeypatch.setattr(connections.Connection, "timeout_keep_alive", seconds, raising=False)
    with connected(server) as client:
        began = time.monotonic()
        for _ in range(4):
            client.sendall(PLAIN + BODY)
            assert answer(client)[0] == 200
            time.sleep(0.5)
        client.sendall(PLAIN + BODY)
        assert answer(client)[0] == 200
        asked = time.monotonic()
        assert client.recv(1) == b""
        assert time.monotonic() - asked > 1.0
        assert time.monotonic() - began > 3.0
