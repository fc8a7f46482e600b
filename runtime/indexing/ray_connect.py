"""A connection to a Ray cluster: there within half a minute, or one sentence why not.

Ray itself tries for minutes, in C++ that no Ctrl-C reaches. So its address is tried first, and
to a cluster Ray connects in a thread that the caller need not wait for.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, TypeVar

from ...errors import EngineError, RequestError

PROBE_S = 4.0  # to be connected, and as long again to be answered
CONNECT_S = 20.0  # for Ray's own connecting, which takes one or two
ADDRESS_VARIABLE = "RAY_ADDRESS"

# How a client of gRPC greets; its server answers with a frame of settings (kind 4).
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_FRAME_BYTES, _SETTINGS = 9, 4

Result = TypeVar("Result")


@contextmanager
def connect(address: str | None) -> Iterator[Any]:
    """Yield the module `ray`, connected; a connection that was there before stays.

    Args:
        address: of a cluster (`host:port`), `auto`, `local` for workers on this machine only, or
            None: Ray's own order, that is RAY_ADDRESS, a cluster this machine is part of, local.

    Raises:
        RequestError: Ray is not installed, or an address of Ray Client.
        EngineError: there is no such cluster, or it does not answer within 30 s.
    """
    named = address
    if address in (None, "auto"):
        named = os.environ.get(ADDRESS_VARIABLE) or address
    if named is not None and named.startswith("ray://"):
        raise RequestError(
            f"{named} is an address of Ray Client, which Ray Data does not work through",
            hint="run `edje index` on a machine of the cluster (or as a Ray job) with --ray auto",
        )
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home unasked
    _check_address(named)
    _init(ray, address, named)
    try:
        yield ray
    finally:
        ray.shutdown()


def import_ray() -> Any:
    """Return the module `ray`, with Ray Data; a RequestError says what is missing."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise RequestError(
            f"indexing on many machines needs Ray Data: {error}",
            hint="pip install 'edje-runtime[cluster]'",
        ) from error
    return ray


def _check_address(address: str | None) -> None:
    """Refuse a `host:port` where no Ray cluster answers."""
    parts = re.fullmatch(r"\[?(.+?)\]?:(\d+)", address or "")
    if parts is None:
        return
    try:
        fault = _within(2 * PROBE_S, lambda: _why_no_cluster(parts[1], int(parts[2])))
    except NotYet:
        fault = "it does not answer"
    if fault is not None:
        raise _no_cluster(address, fault)


def _why_no_cluster(host: str, port: int) -> str | None:
    """Greet as a client of gRPC does; return what is wrong with the answer."""
    if not 0 < port < 1 << 16:
        return f"there is no port {port}"
    try:
        with socket.create_connection((host, port), timeout=PROBE_S) as wire:
            if os.environ.get("RAY_USE_TLS") == "1":  # it has another greeting
                return None
            wire.sendall(_GREETING)
            answer = b""
            while len(answer) < _FRAME_BYTES:
                part = wire.recv(_FRAME_BYTES - len(answer))
                if not part:
                    return "it hangs up"
                answer += part
    except TimeoutError:
        return "it does not answer"
    except OSError as error:
        return error.strerror or str(error)
    return None if answer[3] == _SETTINGS else "something else answers there"


def _init(ray: Any, address: str | None, named: str | None) -> None:
    """Connect to what `named` says; without a cluster's name, Ray may start one here."""

    def init() -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(address, include_dashboard=False, **quiet)
        if abandoned.is_set():
            ray.shutdown()

    abandoned = Event()
    try:
        # A Ray that is started here ends with the thread that has started it (PR_SET_PDEATHSIG).
        if named in (None, "local"):
            init()
        else:
            _within(CONNECT_S, init)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, str(error)) from error
    except NotYet as error:
        raise _no_cluster(address, f"Ray could not connect in {CONNECT_S:.0f} s") from error
    finally:
        abandoned.set()


def _no_cluster(address: str | None, why: str) -> EngineError:
    return EngineError(
        f"cannot connect to the Ray cluster {address or 'of this machine'}: {why}",
        hint="`ray status` shows whether it runs; --ray local needs none",
    )


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """Return what `call` returns, or raise `NotYet`: its thread goes on. Ctrl-C ends the wait."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, name="edje-ray", daemon=True).start()
    return done.result(seconds)
