"""What HTTP and shared batches cost, and what becomes of more requests than can be served.

    edje bench serve DEMO_OUT                       writes serve.json

DEMO_OUT is the folder that `make demo` writes; its store is repeated with noise to 5,000 images.
The server is a process of its own; the requests come from this one, over loopback.

- capacity: 64 clients of 100 candidates, without pause, beside 64 threads that call `Reranker.rank`
  here, in turns. Expected: the server reaches 90 % of it.
- overload: requests arrive at random (an open loop) at half, twice and ten times that capacity.
  Expected: at least 90 % of the capacity is answered in time, refusals take less than 50 ms.
- fairness: 10 candidates that come behind a request of 5,000. Expected: fewer than 3 batches wait.
- front: the CPU time of a request where engine and reading take none, with all results back: one
  request at a time, and 64 at a time, whose pairs share batches. Expected at 64: at most 150 us for
  100 candidates, 5 ms for 5,000, and 300,000 pairs a CPU second at 1,000.

Every answer's order is compared with that of `Reranker.rank`.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..arrays import Float32
from ..engines.manifest import EngineManifest
from ..runtime.reranker import Reranker
from .bench_depths import repeated
from .harness import Progress, command_line, conditions, conditions_line, run_benchmark
from .serve_traffic import ENGINE, STORE, Known, read_queries
from .server_process import ServerProcess, serving

NUM_CLIENTS, NUM_CANDIDATES, NUM_IMAGES, NUM_QUERIES = 64, 100, 5000, 8
LOADS = (0.5, 2.0, 10.0)  # times the capacity
MAX_WAIT_S, TIMEOUT_S = 1.0, 10.0
NUM_ROUNDS = 3
NUM_PREPARED = 200  # different requests
FRONT = {100: 2000, 1000: 300, 5000: 100}  # candidates -> requests a round
MOST_FRONT_US = {100: 150, 1000: 3333, 5000: 5000}
FREE = (sys.executable, "-m", "edje.perf.serve_free")


@dataclass(slots=True)
class Outcome:
    """What became of the requests of one load."""

    latencies: dict[int, list[float]] = field(default_factory=dict)
    num_wrong: int = 0
    num_hung: int = 0

    def add(self, status: int, seconds: float) -> None:
        """Count an answer."""
        self.latencies.setdefault(status, []).append(seconds)

    def figures(self, status: int) -> dict[str, float]:
        """Return count and percentiles (ms) of one status; 0 where there is none."""
        found = np.array(self.latencies.get(status, []) or [0.0]) * 1e3
        p50, p99 = np.percentile(found, [50, 99])
        return {
            "number": len(self.latencies.get(status, [])),
            "p50_ms": round(float(p50), 1),
            "p99_ms": round(float(p99), 1),
            "max_ms": round(float(found.max()), 1),
        }


class Traffic:
    """Requests of 100 candidates, and what each must be answered."""

    def __init__(self, known: Known, port: int, seed: int = 0):
        """Make the requests now: the generator shares the server's cores."""
        self._port = port
        self._random = random.Random(seed)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._prepared = [self._prepare(known) for _ in range(NUM_PREPARED)]

    def _prepare(self, known: Known) -> tuple[bytes, Float32, Float32]:
        """Return a body, the scores of its candidates, and the best of them."""
        query = self._random.choice(list(known.scores))
        picked = self._random.sample(range(len(known.ids)), NUM_CANDIDATES)
        body = {"query": query, "documents": [known.ids[i] for i in picked], "top_n": 10}
        scores = known.scores[query][picked]
        return json.dumps(body).encode(), scores, -np.sort(-scores)[:10]

    async def ask(self, outcome: Outcome) -> None:
        """Send one request, compare the order of its answer."""
        body, scores, best = self._random.choice(self._prepared)
        began = time.perf_counter()
        try:
            status, payload = await asyncio.wait_for(self._send(body), 60)
        except asyncio.TimeoutError:
            outcome.num_hung += 1
            return
        outcome.add(status, time.perf_counter() - began)
        if status == 200:
            found = [scores[result["index"]] for result in json.loads(payload)["results"]]
            outcome.num_wrong += not np.allclose(found, best, atol=1e-4)

    async def _send(self, body: bytes) -> tuple[int, bytes]:
        reader, writer = (
            self._idle.pop()
            if self._idle
            else await asyncio.open_connection("127.0.0.1", self._port)
        )
        head = f"POST /v2/rerank HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(one.split(":")[1]) for one in lines if one.startswith("content-length"))
        payload = await reader.readexactly(length)
        self._idle.append((reader, writer))
        return int(lines[0].split()[1]), payload

    async def closed_loop(self, seconds: float) -> Outcome:
        """Let 64 clients ask without pause."""
        outcome, until = Outcome(), time.perf_counter() + seconds

        async def client() -> None:
            while time.perf_counter() < until:
                await self.ask(outcome)

        await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
        return outcome

    async def open_loop(self, requests_per_s: float, seconds: float) -> Outcome:
        """Let requests arrive at random, whatever becomes of those before."""
        outcome, asked = Outcome(), []
        began = due = time.perf_counter()
        while due < began + seconds:
            due += self._random.expovariate(requests_per_s)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            asked.append(asyncio.create_task(self.ask(outcome)))
        await asyncio.gather(*asked)
        return outcome


def measure(demo: Path, seconds: float, scratch: Path, progress: Progress) -> dict[str, Any]:
    """Measure everything; `seconds` a load."""
    engine, store = demo / ENGINE, repeated(demo / STORE, scratch / "store", NUM_IMAGES)
    known = Known.of(engine, store, read_queries(demo, NUM_QUERIES))
    with serving(engine, store, "--max-wait", "600", scratch=scratch) as server:
        progress("capacity")
        capacity = measure_capacity(engine, store, server, known, seconds)
        progress("10 behind 5,000")
        fairness = measure_fairness(server, known)
    waits = ("--max-wait", str(MAX_WAIT_S), "--timeout", str(TIMEOUT_S))
    with serving(engine, store, *waits, scratch=scratch) as server:
        loads = {}
        for times in LOADS:
            progress(f"{times:g} times the capacity")
            loads[f"{times:g}"] = measure_load(server, known, capacity, times, seconds)
    progress("the front alone")
    front = measure_front(engine, store, known)
    manifest = EngineManifest.read(engine)
    result = {
        "conditions": conditions(
            backend=f"{manifest.backend} {manifest.backend_version} {manifest.precision}",
            images=NUM_IMAGES,
            clients=NUM_CLIENTS,
            candidates=NUM_CANDIDATES,
            max_wait_s=MAX_WAIT_S,
            seconds=seconds,
        ),
        "capacity": capacity,
        "loads": loads,
        "fairness": fairness,
        "front": front,
    }
    return {**result, "faults": faults_of(result)}


def measure_capacity(
    engine: Path, store: Path, server: ServerProcess, known: Known, seconds: float
) -> dict[str, float]:
    """Compare the server with `rank` called directly, in turns; the best round of each counts."""
    served, direct, wrong = [], [], 0
    with Reranker.open(engine, store=store) as reranker:
        reranker.warm_up()
        for number in range(NUM_ROUNDS):
            traffic, began = Traffic(known, server.port, number), time.perf_counter()
            outcome = asyncio.run(traffic.closed_loop(seconds))
            answered = len(outcome.latencies.get(200, []))
            served.append(answered * NUM_CANDIDATES / (time.perf_counter() - began))
            wrong += outcome.num_wrong
            direct.append(_rank_directly(reranker, known, seconds))
    return {
        "served_pairs_per_s": round(max(served), 1),
        "direct_pairs_per_s": round(max(direct), 1),
        "share": round(max(served) / max(direct), 3),
        "wrong": wrong,
    }


def _rank_directly(reranker: Reranker, known: Known, seconds: float) -> float:
    """Return pairs/s of as many threads as there are clients."""
    counts, began = [0] * NUM_CLIENTS, time.perf_counter()
    until = began + seconds

    def work(number: int) -> None:
        chance = random.Random(number)
        while time.perf_counter() < until:
            query = chance.choice(list(known.scores))
            reranker.rank(query, chance.sample(known.ids, NUM_CANDIDATES), 10)
            counts[number] += NUM_CANDIDATES

    threads = [threading.Thread(target=work, args=(number,)) for number in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - began)


def measure_load(
    server: ServerProcess,
    known: Known,
    capacity: Mapping[str, float],
    times: float,
    seconds: float,
) -> dict[str, Any]:
    """Send so many times what the server can answer."""
    rate = times * capacity["served_pairs_per_s"] / NUM_CANDIDATES
    traffic, began = Traffic(known, server.port, 9), time.perf_counter()
    outcome = asyncio.run(traffic.open_loop(rate, seconds))
    took = time.perf_counter() - began
    answered = len(outcome.latencies.get(200, []))
    return {
        "requests_per_s": round(rate, 1),
        "answered_pairs_per_s": round(answered * NUM_CANDIDATES / took, 1),
        "of_capacity": round(answered * NUM_CANDIDATES / took / capacity["served_pairs_per_s"], 3),
        "statuses": {str(code): len(found) for code, found in sorted(outcome.latencies.items())},
        "accepted": outcome.figures(200),
        "refused": outcome.figures(429),
        "hung": outcome.num_hung,
        "wrong": outcome.num_wrong,
    }


def measure_fairness(server: ServerProcess, known: Known) -> dict[str, Any]:
    """Ask for 10 while 5,000 are scored; count the batches in between."""
    query = next(iter(known.scores))
    large = {"query": query, "documents": list(known.ids), "top_n": 1}
    small = {"query": query, "documents": list(known.ids[:10])}
    waited = []
    for _ in range(NUM_ROUNDS):
        asking = threading.Thread(target=server.ask, args=("/rerank", large))
        before = server.metrics()["edje_batch_pairs_count"]
        asking.start()
        while server.metrics()["edje_batch_pairs_count"] < before + 2:
            time.sleep(0.005)
        at = server.metrics()["edje_batch_pairs_count"]
        server.ask("/rerank", small)
        waited.append(server.metrics()["edje_batch_pairs_count"] - at - 1)
        asking.join()
    return {"batches_waited": waited, "batches_of_5000": -(-len(known.ids) // 256)}


def measure_front(engine: Path, store: Path, known: Known) -> dict[str, dict[str, float]]:
    """Measure the server's CPU time a request, all threads, where scoring costs nothing."""
    found: dict[str, dict[str, float]] = {}
    with serving(engine, store, command=FREE) as server:
        for number, repeats in FRONT.items():
            body = {"query": "a red circle", "documents": list(known.ids[:number])}
            raw = json.dumps(body).encode()
            alone = min(asyncio.run(_cpu_s(server, raw, 1, repeats)) for _ in range(NUM_ROUNDS))
            shared = min(
                asyncio.run(_cpu_s(server, raw, NUM_CLIENTS, repeats)) for _ in range(NUM_ROUNDS)
            )
            found[str(number)] = {
                "cpu_us": round(shared * 1e6, 1),
                "cpu_us_alone": round(alone * 1e6, 1),
                "pairs_per_cpu_s": round(number / shared),
            }
    return found


async def _cpu_s(server: ServerProcess, raw: bytes, num_clients: int, repeats: int) -> float:
    """Return CPU seconds a request where so many clients ask without pause."""
    head = f"POST /v2/rerank HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n".encode()

    async def ask(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for _ in range(number):
            writer.write(head + raw)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            assert " 200 " in lines[0], lines[0]
            length = next(
                int(one.split(":")[1]) for one in lines if one.startswith("content-length")
            )
            await reader.readexactly(length)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    await asyncio.gather(*(ask(1) for _ in range(num_clients)))
    each = -(-repeats // num_clients)
    before = server.cpu_s()
    await asyncio.gather(*(ask(each) for _ in range(num_clients)))
    return (server.cpu_s() - before) / (each * num_clients)


def faults_of(result: Mapping[str, Any]) -> list[str]:
    """Name the expectations that do not hold."""
    faults = []
    if result["capacity"]["share"] < 0.9:
        faults.append(
            f"the server reaches {result['capacity']['share']:.0%} of rank, expected 90 %"
        )
    for times, load in result["loads"].items():
        if load["hung"] or load["wrong"]:
            faults.append(f"at {times} times: {load['hung']} hung, {load['wrong']} wrong")
        if float(times) >= 1 and load["of_capacity"] < 0.9:
            faults.append(f"at {times} times {load['of_capacity']:.0%} of the capacity, not 90 %")
        if load["refused"]["number"] and load["refused"]["p99_ms"] > 50:
            faults.append(f"at {times} times refusals take {load['refused']['p99_ms']} ms (p99)")
    for number, most_us in MOST_FRONT_US.items():
        front = result["front"].get(str(number))
        if front is not None and front["cpu_us"] > most_us:
            faults.append(f"the front takes {front['cpu_us']:,.0f} us at {number}, not {most_us:,}")
    if median(result["fairness"]["batches_waited"]) >= 3:
        faults.append(f"10 behind 5,000 waited {result['fairness']['batches_waited']} batches")
    return faults


def summary(result: Mapping[str, Any]) -> str:
    """Return what a person reads."""
    capacity, fairness = result["capacity"], result["fairness"]
    lines = [
        f"capacity: {capacity['served_pairs_per_s']:,.0f} pairs/s served, "
        f"{capacity['direct_pairs_per_s']:,.0f} by rank: {capacity['share']:.0%}",
    ]
    for times, load in result["loads"].items():
        accepted, refused = load["accepted"], load["refused"]
        lines.append(
            f"{times:>4} times: {load['of_capacity']:.0%} answered in time, p99 "
            f"{accepted['p99_ms']:,.0f} ms; {refused['number']:,} refused, p99 "
            f"{refused['p99_ms']:,.1f} ms; {load['hung']} hung, {load['wrong']} wrong"
        )
    lines.append(f"10 behind 5,000: {fairness['batches_waited']} batches waited")
    for number, front in result["front"].items():
        lines.append(
            f"front, {number} candidates: {front['cpu_us']:,.0f} us CPU a request (one at a time "
            f"{front['cpu_us_alone']:,.0f}), {front['pairs_per_cpu_s']:,} pairs a CPU second"
        )
    lines += result["faults"]
    return "\n".join([*lines, conditions_line(result["conditions"], "backend", "images")])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = command_line("serve", __doc__)
    parser.add_argument("demo", type=Path, help="folder that `make demo` has written")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    options = parser.parse_args(arguments)
    return run_benchmark(
        options, lambda *more: measure(options.demo, options.seconds, *more), summary
    )


if __name__ == "__main__":
    sys.exit(main())
