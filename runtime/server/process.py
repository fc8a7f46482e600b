"""The process of `edje serve`: sockets, signals, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn
import uvloop

from .admin import make_admin_app
from .app import make_app
from .connections import Connection
from .host import DRAIN_S, Host
from .logs import JsonLog
from .settings import FrontSettings

EXIT_DEAD_ENGINE = 1
GARBAGE_THRESHOLD = 50_000  # new objects between two collections of the youngest; Python's: 700
KEEP_ALIVE_S = 75  # longer than balancers and pools keep idle connections (60): they close first


class Server(uvicorn.Server):
    """uvicorn that drains first: it says not ready, waits, and only then stops to accept."""

    def __init__(self, config: uvicorn.Config, host: Host, grace_s: float):
        super().__init__(config)
        self._host, self._grace_s = host, grace_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end on SIGTERM or Ctrl-C; one more signal ends at once.

        uvicorn's own would raise the signal again at the end: nothing would be closed, and an
        orderly end would look like a crash.
        """
        if self.should_exit:
            self.force_exit = True
        elif self._host.draining is not None or sig == signal.SIGINT:
            self._end()
        else:
            self._host.drain("the server is ending")
            timer = threading.Timer(self._grace_s, self._end)
            timer.daemon = True  # an end without grace need not wait for it
            timer.start()

    def _end(self) -> None:
        self.should_exit = True


def serve(
    settings: FrontSettings,
    *,
    address: str,
    port: int,
    admin_port: int | None = None,
    grace_s: float = 0.0,
    drain_s: float = DRAIN_S,
    on_ready: Callable[[Host, int], None] = lambda host, port: None,
) -> int:
    """Serve until a signal ends it, or the engine dies; return the exit code.

    SIGTERM: not ready at once, after `grace_s` seconds no new connection, what was accepted is
    answered within `drain_s`. SIGHUP: open engine and store anew, and let them take over.

    Args:
        address: to listen on.
        port: 0: any that is free.
        admin_port: on the loopback address; None: no admin routes.
        on_ready: called with the host and the port once requests are taken, on the event loop:
            it must not wait, so it says things by `host.log`.

    Raises:
        EdjeError: engine or store cannot be opened.
    """
    _heed_signals_while_opening()
    _spare_collecting()
    log = JsonLog()
    log.take_over()
    ending: list[Callable[[], None]] = []

    def die(why: str) -> None:
        for end in ending:
            end()

    host = Host(settings, log, on_death=die)
    code = 0
    try:
        code = uvloop.run(
            _serve(host, address, port, admin_port, grace_s, drain_s, on_ready, ending)
        )
    finally:
        host.close(drain_s)
        log.close()
    return EXIT_DEAD_ENGINE if host.health.dead else code


async def _serve(
    host: Host,
    address: str,
    port: int,
    admin_port: int | None,
    grace_s: float,
    drain_s: float,
    on_ready: Callable[[Host, int], None],
    ending: list[Callable[[], None]],
) -> int:
    config = uvicorn.Config(
        make_app(host),
        host=address,
        port=port,
        http=Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(drain_s)),
        lifespan="off",
    )
    server = Server(config, host, grace_s)
    admin = None
    if admin_port is not None:
        admin = uvicorn.Server(
            uvicorn.Config(
                make_admin_app(host),
                host="127.0.0.1",
                port=admin_port,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
            )
        )
        admin.install_signal_handlers = lambda: None  # type: ignore[attr-defined]

    def end() -> None:
        server.should_exit = True

    ending.append(end)
    loop = asyncio.get_running_loop()
    with suppress(NotImplementedError, AttributeError):  # no SIGHUP on Windows
        loop.add_signal_handler(signal.SIGHUP, _reload_aside, host)
    tasks = [loop.create_task(server.serve())]
    if admin is not None:
        tasks.append(loop.create_task(admin._serve()))
    while not server.started and not tasks[0].done():
        await asyncio.sleep(0.01)
    if server.started:
        on_ready(host, server.servers[0].sockets[0].getsockname()[1])
    await tasks[0]
    if admin is not None:
        admin.should_exit = True
        await tasks[1]
    return 0


def _heed_signals_while_opening() -> None:
    """Let SIGTERM end a server that is still opening, and SIGHUP not.

    The first process of a container ignores signals that it has no handler for: its pod would hang
    in its end until it is killed.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def end(sig: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + sig)

    signal.signal(signal.SIGTERM, end)
    with suppress(AttributeError):  # no SIGHUP on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what is opened is the newest anyway


def _spare_collecting() -> None:
    """Let the garbage collector look seldom, and never at what was imported.

    It took a seventh of a request's time: a request leaves no cycles behind, but many objects live
    while many requests wait. What is opened later stays collectable, for a reload.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD, *gc.get_threshold()[1:])


def _reload_aside(host: Host) -> None:
    """Reload on a thread of its own: it takes seconds."""

    def reload() -> None:
        with suppress(Exception):  # it is in the log, and the old service goes on
            host.reload()

    threading.Thread(target=reload, name="edje-reload", daemon=True).start()
