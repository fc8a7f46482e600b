"""What goes over a connection: an answer in one piece, whatever the kind of answer."""

from __future__ import annotations

import asyncio
import socket

from edje.runtime.server.connections import Joined
from running_server import Running


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
