"""Minutes of mixed, rude traffic: is every answer right, and does the server hold ever more?

    python -m edje.perf.soak_serve DEMO_OUT --minutes 10

DEMO_OUT is the folder that `make demo` writes. The server is a process of its own. Clients send all
dialects in all sizes and check every score against what `Reranker.rank` gave before; between them
they leave before the answer, read slowly, send bodies that are none, and ask for what cannot be
done in time. The operator reloads engine and store all the while. Memory, open files and threads
of the server are sampled; what grows over the last two thirds of the time is a fault.

`--command` runs another server, for instance one that leaks: this must find it.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Float32
from .harness import command_line, conditions, conditions_line, run_benchmark
from .serve_traffic import ENGINE, STORE, Known, read_queries
from .server_process import EDJE, ServerProcess, serving

NUM_CLIENTS, NUM_QUERIES, MAX_CANDIDATES = 4, 12, 300
RELOAD_EVERY_S, SAMPLE_EVERY_S = 20.0, 0.5
WARM = 1 / 3  # of the time: what is allocated then is not held against the server
NUM_BLOCKS = 16
TOLERANCE = 1e-4  # of a raw logit
# What may be gained over the measured time: a share of what there was, and an amount.
ALLOWED = {"rss_mb": (0.02, 4.0), "fds": (0.0, 2.0), "threads": (0.0, 2.0)}

Ask = tuple[str, dict[str, Any], Callable[[Any], Float32]]


def measure(
    demo: Path,
    minutes: float,
    command: Sequence[str],
    scratch: Path,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Soak a server; return what it held, what it answered, and what is wrong."""
    engine, store = demo / ENGINE, demo / STORE
    known = Known.of(engine, store, read_queries(demo, NUM_QUERIES))
    soak = Soak(known)
    samples: list[dict[str, float]] = []
    with serving(engine, store, command=command, scratch=scratch) as server:
        progress(f"soaking process {server.pid} for {minutes:g} minutes")
        threads = [
            threading.Thread(target=soak.press, args=(server, number), daemon=True)
            for number in range(NUM_CLIENTS)
        ]
        threads.append(threading.Thread(target=soak.reload, args=(server,), daemon=True))
        for thread in threads:
            thread.start()
        began = time.monotonic()
        while (now := time.monotonic() - began) < minutes * 60 and not server.has_ended:
            samples.append({"s": round(now, 2), **server.holds()})
            time.sleep(SAMPLE_EVERY_S)
        soak.stopping.set()
        for thread in threads:
            thread.join(60)
        hanging = sum(thread.is_alive() for thread in threads)
        metrics = {} if server.has_ended else server.metrics()
        code = server.end() if not server.has_ended else -1
        log = server.log_text()
    growth = {name: growth_of(samples, name) for name in ALLOWED}
    faults = [*faults_of(growth), *soak.faults[:20]]
    if hanging:
        faults.append(f"{hanging} clients hang")
    if code:
        faults.append(f"the server ended with {code}, expected 0; its log ends:\n{log[-3000:]}")
    return {
        "conditions": conditions(minutes=minutes, clients=NUM_CLIENTS, demo_images=len(known.ids)),
        "answers_checked": soak.num_checked,
        "outcomes": dict(sorted(soak.outcomes.items())),
        "growth": growth,
        "metrics": {name: metrics[name] for name in sorted(metrics) if name in TOLD},
        "samples": samples[:: max(1, len(samples) // 60)],
        "faults": faults,
    }


TOLD = (
    "edje_pairs_total",
    "edje_disconnects_total",
    "edje_dropped_pairs_total",
    'edje_reloads_total{outcome="done"}',
    'edje_reloads_total{outcome="failed"}',
    "edje_log_lines_lost_total",
)


class Soak:
    """The clients, and what they met."""

    def __init__(self, known: Known):
        self._known = known
        self.stopping = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.num_checked = 0
        self._lock = threading.Lock()

    def press(self, server: ServerProcess, number: int) -> None:
        """Be one client until the end."""
        draw = random.Random(number)
        rude = (self._leave, self._read_slowly, self._send_rubbish, self._hurry)
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        while not self.stopping.is_set():
            try:
                if draw.random() < 0.75:
                    self._ask_well(connection, draw)
                else:
                    draw.choice(rude)(server.port, draw)
            except (OSError, HTTPException, KeyError, ValueError, TypeError) as error:
                connection.close()
                if not self.stopping.is_set():
                    self._fault(f"a client met {error!r}")
                    time.sleep(0.1)
        connection.close()

    def reload(self, server: ServerProcess) -> None:
        """Be the operator until the end."""
        while not self.stopping.wait(RELOAD_EVERY_S):
            status, body = server.ask("/reload", {}, admin=True, timeout_s=120)
            self._count("reload", status)
            if status != 200:
                self._fault(f"a reload failed: {body[:200]!r}")

    def _ask_well(self, connection: HTTPConnection, draw: random.Random) -> None:
        """Send a right request of some dialect and size; check every score, and the order."""
        query = draw.choice(list(self._known.scores))
        size = draw.choice((1, 5, 20, 100, MAX_CANDIDATES))
        picked = [draw.randrange(len(self._known.ids)) for _ in range(size)]
        ids = [self._known.ids[i] for i in picked]
        path, body, read = draw.choice(DIALECTS)(query, ids)
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        raw = response.read()
        self._count(path, response.status)
        if response.status == 429:  # this machine has other work; when to come back was said
            time.sleep(float(response.headers["retry-after"]))
            return
        if response.status != 200:
            self._fault(f"{path} answered {response.status}: {raw[:200]!r}")
            return
        wrong = self._known.wrong(query, picked, read(json.loads(raw)), TOLERANCE)
        with self._lock:
            self.num_checked += size
        if wrong:
            self._fault(f"{path} gave wrong scores for {query!r} and {size} candidates")

    def _leave(self, port: int, draw: random.Random) -> None:
        """Send a request and go before the answer."""
        with _connected(port) as client:
            client.sendall(self._raw(draw, draw.choice((100, 2000))))
            time.sleep(draw.random() * 0.2)
        self._count("left", 0)

    def _read_slowly(self, port: int, draw: random.Random) -> None:
        """Send a large request and read its answer drop by drop, for a while."""
        with _connected(port) as client, suppress(ConnectionError, TimeoutError):
            client.sendall(self._raw(draw, 3000))
            client.recv(1000)
            client.settimeout(1.0)  # an error is shorter than what we would read
            for _ in range(10):
                client.recv(1000)
                time.sleep(0.05)
        self._count("read slowly", 0)

    def _send_rubbish(self, port: int, draw: random.Random) -> None:
        """Send a body that is no request; it must be refused as such."""
        rubbish = draw.choice(
            [draw.randbytes(200), b"", b"[]", b'{"query": 1}', b"[" * 5000, b'{"query":"a",']
        )
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", draw.choice(("/rerank", "/score", "/ranking")), rubbish)
        response = connection.getresponse()
        json.loads(response.read())
        connection.close()
        self._count("rubbish", response.status)
        if response.status not in (400, 422):
            self._fault(f"rubbish was answered with {response.status}")

    def _hurry(self, port: int, draw: random.Random) -> None:
        """Ask for much in little time."""
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        raw = self._raw(draw, 2000).partition(b"\r\n\r\n")[2]
        connection.request("POST", "/rerank", raw, {"x-request-timeout-ms": "20"})
        response = connection.getresponse()
        response.read()
        connection.close()
        self._count("hurried", response.status)
        if response.status not in (200, 429, 504):
            self._fault(f"a hurried request was answered with {response.status}")

    def _raw(self, draw: random.Random, size: int) -> bytes:
        ids = draw.choices(self._known.ids, k=size)
        query = draw.choice(list(self._known.scores))
        body = json.dumps({"query": query, "documents": ids, "return_documents": True}).encode()
        head = f"POST /rerank HTTP/1.1\r\nhost: edje\r\ncontent-length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def _count(self, what: str, status: int) -> None:
        with self._lock:
            self.outcomes[f"{what} {status}" if status else what] += 1

    def _fault(self, what: str) -> None:
        with self._lock:
            self.faults.append(what)


def _connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def _in_order(rows: Sequence[Mapping[str, Any]], name: str) -> Float32:
    """Return the scores by index; NaN everywhere where they do not descend."""
    scores = np.full(len(rows), np.nan, np.float32)
    descending = [float(row[name]) for row in rows]
    if descending == sorted(descending, reverse=True):
        scores[[row["index"] for row in rows]] = descending
    return scores


def _cohere(query: str, ids: list[str]) -> Ask:
    body = {"query": query, "documents": ids, "raw_scores": True}
    return "/v2/rerank", body, lambda found: _in_order(found["results"], "relevance_score")


def _tei(query: str, ids: list[str]) -> Ask:
    body = {"query": query, "texts": ids, "raw_scores": True}
    return "/rerank", body, lambda found: _in_order(found, "score")


def _nvidia(query: str, ids: list[str]) -> Ask:
    body = {"query": {"text": query}, "passages": [{"text": one} for one in ids]}
    return "/v1/ranking", body, lambda found: _in_order(found["rankings"], "logit")


def _score(query: str, ids: list[str]) -> Ask:
    body = {"text_1": query, "text_2": ids, "use_activation": False}
    return "/score", body, lambda found: np.array([o["score"] for o in found["data"]], np.float32)


def _kserve(query: str, ids: list[str]) -> Ask:
    inputs = [
        {"name": "QUERY", "datatype": "BYTES", "shape": [1], "data": [query]},
        {"name": "IDS", "datatype": "BYTES", "shape": [len(ids)], "data": ids},
    ]
    return (
        "/v2/models/edje/infer",
        {"inputs": inputs},
        lambda found: np.array(found["outputs"][0]["data"], np.float32),
    )


DIALECTS = (_cohere, _tei, _nvidia, _score, _kserve)


def growth_of(samples: Sequence[Mapping[str, float]], name: str) -> dict[str, float]:
    """Return what a line through the samples gains from the end of the warm-up to the end.

    `gained` is the line's, `at_least` its lower bound (95 %): the samples become the minima of
    blocks, whose scatter around the line says how sure it is. Minima, because what requests on
    their way hold is no growth.
    """
    values = np.array([sample[name] for sample in samples])[round(len(samples) * WARM) :]
    blocks = np.array([part.min() for part in np.array_split(values, NUM_BLOCKS) if len(part)])
    at = np.arange(len(blocks)) - (len(blocks) - 1) / 2
    if len(blocks) < 4:
        return {"first": float(values[0]), "gained": 0.0, "at_least": 0.0}
    slope = float(at @ blocks / (at @ at))
    residual = blocks - blocks.mean() - slope * at
    error = float(np.sqrt(residual @ residual / (len(blocks) - 2) / (at @ at)))
    span = len(blocks) - 1
    return {
        "first": round(float(blocks[0]), 2),
        "gained": round(slope * span, 3),
        "at_least": round((slope - 2.14 * error) * span, 3),  # t, 14 degrees of freedom
    }


def faults_of(growth: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return one sentence for each thing of which the server held ever more."""
    faults = []
    for name, (share, amount) in ALLOWED.items():
        found = growth[name]
        allowed = max(amount, share * found["first"])
        if found["at_least"] > allowed:
            faults.append(
                f"{name} grew by {found['gained']:.1f} from {found['first']:.1f} (at least "
                f"{found['at_least']:.1f}), expected {allowed:.1f} at most"
            )
    return faults


def summary(result: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    grown = [
        f"{name:8} {one['first']:9.1f} at first, {one['gained']:+8.2f} since (at least "
        f"{one['at_least']:+.2f})"
        for name, one in result["growth"].items()
    ]
    outcomes = [f"{name:28} {number:8,}" for name, number in result["outcomes"].items()]
    where = conditions_line(result["conditions"], "minutes", "clients")
    return "\n".join(
        [
            f"{result['answers_checked']:,} scores checked",
            *grown,
            *outcomes,
            *(f"FAULT: {fault}" for fault in result["faults"]),
            where,
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write `soak_serve.json`; return 1 where something is wrong."""
    parser = command_line("serve", __doc__)
    parser.prog = "python -m edje.perf.soak_serve"
    parser.set_defaults(name="soak_serve")
    parser.add_argument("demo", type=Path, help="folder that `make demo` wrote")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--command", default=shlex.join(EDJE), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return run_benchmark(
        options,
        lambda scratch, progress: measure(
            options.demo, options.minutes, shlex.split(options.command), scratch, progress
        ),
        summary,
    )


if __name__ == "__main__":
    sys.exit(main())
