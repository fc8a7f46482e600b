"""Where no Ray cluster answers, `--ray` ends soon with one sentence, and at once on Ctrl-C."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from edje.errors import EngineError, RequestError
from edje.runtime.indexing import ray_connect
from edje.runtime.indexing.ray_connect import connect

pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'edje-runtime[cluster]'")

SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # what a server of gRPC says first


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Yield the address of a server on this machine that does `answer` with every connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    wire, _ = listener.accept()
                except OSError:
                    return
                held.append(wire)
                answer(wire)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for wire in held:
                wire.close()


def silent(wire: socket.socket) -> None:
    """Accept, and say nothing."""


def refused(address: str) -> str:
    with (
        pytest.raises(EngineError, match="cannot connect to the Ray cluster") as caught,
        connect(address),
    ):
        pytest.fail("there is no cluster")
    assert address in str(caught.value)
    assert "ray status" in str(caught.value)
    return str(caught.value)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_closed_port_is_refused_and_said_so() -> None:
    assert "Connection refused" in refused(f"127.0.0.1:{closed_port()}")


def test_what_cannot_be_an_address_is_said_so() -> None:
    assert "there is no port 99999" in refused("127.0.0.1:99999")
    assert "not known" in refused("no-such-host.invalid:6379")


def test_the_address_of_the_environment_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port()}")
    for address in (None, "auto"):
        with pytest.raises(EngineError, match="Connection refused"), connect(address):
            pytest.fail("there is no cluster")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(RequestError, match="Ray Client"), connect(None):
        pytest.fail("there is no cluster")


def test_who_accepts_and_never_answers_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_connect, "PROBE_S", 0.2)
    with server(silent) as address:
        assert "it does not answer" in refused(address)


def test_who_hangs_up_or_says_something_else_is_no_cluster() -> None:
    with server(lambda wire: wire.shutdown(socket.SHUT_RDWR)) as address:
        refused(address)
    with server(lambda wire: wire.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as address:
        assert "something else answers there" in refused(address)


def test_all_ways_together_take_less_than_half_a_minute() -> None:
    assert 2 * ray_connect.PROBE_S + ray_connect.CONNECT_S < 30


# Ends when it is done: what would go on without end in the background has a process of its own.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
from edje.errors import EngineError
from edje.runtime.indexing import ray_connect
ray_connect.PROBE_S, ray_connect.CONNECT_S = map(float, sys.argv[2:])
ray_connect.import_ray()
print("begins", flush=True)
try:
    with ray_connect.connect(sys.argv[1]):
        print("connected")
except EngineError as error:
    print(error.message)
except KeyboardInterrupt:
    print("interrupted")
"""


@contextmanager
def connecting(address: str, probe_s: float, connect_s: float) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that is about to connect."""
    command = [sys.executable, "-c", PROGRAM, address, str(probe_s), str(connect_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        try:
            yield process
        finally:
            process.kill()


def greeted(wire: socket.socket) -> None:
    """Greet as a server of gRPC does, and then say nothing: Ray would wait for minutes."""
    wire.sendall(SETTINGS)


def test_ray_that_connects_to_nobody_is_given_up() -> None:
    with server(greeted) as address, connecting(address, 60, 0.5) as process:
        shown, _ = process.communicate(timeout=60)
    assert "cannot connect to the Ray cluster" in shown
    assert "Ray could not connect in" in shown
    assert process.returncode == 0


@pytest.mark.parametrize("answer", [silent, greeted])
def test_ctrl_c_ends_the_wait_at_once(answer: Callable[[socket.socket], None]) -> None:
    accepted = threading.Event()

    def note(wire: socket.socket) -> None:
        answer(wire)
        accepted.set()

    with server(note) as address, connecting(address, 600, 600) as process:
        assert accepted.wait(60)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=60)  # a tenth of what it would wait
    assert shown == "interrupted\n"


@pytest.mark.parametrize("address", ["ray://head:10001"])
def test_ray_client_is_refused(address: str) -> None:
    with (
        pytest.raises(RequestError, match=r"ray://head:10001 .*[\s\S]*--ray auto"),
        connect(address),
    ):
        pytest.fail("the block must not run")


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"edje-runtime\[cluster\]"), connect(None):
        pytest.fail("the block must not run")
