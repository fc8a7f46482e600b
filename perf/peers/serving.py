"""`edje serve` beside the same engine behind plain FastAPI and pydantic, each its own process.

Two loads, both over loopback, from clients that ask without pause and check every answer's order:

- `front`: 1,000 candidates with an engine and reads that take no time: what HTTP, JSON and Python
  cost. All results come back.
- `small`: a few candidates a request with the real engine, where sharing batches can pay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ...errors import EdjeError
from ...runtime.results import Hit
from ..harness import take_turns
from ..report import Measured
from ..serve_traffic import asking
from ..server_process import EDJE, ServerProcess, serving
from .contest import Bench

GROUP = "peers-serving"
PLAIN = (sys.executable, "-m", "edje.perf.peers.plain_server")
FREE = (*EDJE[:2], "edje.perf.serve_free")
NAMES = ("edje-serve", "plain-fastapi")


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients of one load do in a turn.

    Attributes:
        name: its own.
        is_free: the engine takes no time.
        clients: that ask at the same time, on a connection each.
        requests: of each client.
        candidates: of a request; all results come back.
    """

    name: str
    is_free: bool
    clients: int
    requests: int
    candidates: int


LOADS = (Load("front", True, 4, 4, 1000), Load("small", False, 16, 1, 4))


def measure_serving(
    bench: Bench, engine: Path, query: str, num_rounds: int, loads: Sequence[Load] = LOADS
) -> list[Measured]:
    """Measure both servers in turns, a load after the other.

    Raises:
        EdjeError: a server does not come up, or they rank differently.
    """
    made = []
    for load in loads:
        bench.progress(f"serving: {load.name}")
        commands = {"edje-serve": FREE if load.is_free else EDJE, "plain-fastapi": PLAIN}
        with ExitStack() as stack:
            servers, turns = {}, {}
            for name, command in commands.items():
                free = ("--free",) if load.is_free and command is PLAIN else ()
                running = serving(
                    engine, bench.store, *free, command=command, scratch=bench.scratch
                )
                servers[name] = stack.enter_context(running)
                turns[name] = clients(stack, servers[name], load, query, bench.ids)
            rankings = [[_order(each) for each in turn()] for turn in turns.values()]
            if rankings[0] != rankings[1]:
                raise EdjeError(f"{' and '.join(NAMES)} rank differently: nothing is reported")
            used = {name: server.cpu_s() for name, server in servers.items()}
            times = take_turns(turns, num_rounds)
            asked = load.clients * load.requests
            made += [
                Measured(
                    name,
                    GROUP,
                    [ms / 1e3 for ms in took.wall_ms],
                    pairs=asked * load.candidates,
                    params={"load": load.name, "candidates": load.candidates},
                    conditions={
                        "clients": load.clients,
                        "requests_per_s": round(asked / min(took.wall_ms) * 1e3, 2),
                        "server_cpu_ms_per_request": round(
                            (servers[name].cpu_s() - used[name]) * 1e3 / (asked * num_rounds), 3
                        ),
                        "engine": "takes no time" if load.is_free else "auto",
                    },
                )
                for name, took in times.items()
            ]
    return made


def clients(
    stack: ExitStack, server: ServerProcess, load: Load, query: str, ids: Sequence[str]
) -> Callable[[], list[list[Hit]]]:
    """Return one turn of all clients at once: the last ranking of each."""
    last = max(1, len(ids) - load.candidates + 1)
    starts = [at * load.candidates % last for at in range(load.clients)]
    asks = [
        asking(stack, server, query, ids[start : start + load.candidates], load.candidates)
        for start in starts
    ]
    pool = stack.enter_context(ThreadPoolExecutor(load.clients))

    def repeat(ask: Callable[[], list[Hit]]) -> list[Hit]:
        for _ in range(load.requests - 1):
            ask()
        return ask()

    return lambda: list(pool.map(repeat, asks))


def _order(hits: Sequence[Hit]) -> list[str]:
    return [hit.id for hit in hits]
