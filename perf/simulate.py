"""A discrete-event simulation of the runtime: one request's batches, and a server under load.

Time passes only in the simulation. A stage serves one batch after the other. The calling thread
reads and launches; copies in, compute and copies back run beside it in streams of their own. The
server forms its batches with the runtime's own `Scheduler`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf

import numpy as np

from ..arrays import Float64, even_parts
from ..runtime.pipeline import NUM_SLOTS
from ..runtime.server.scheduler import Job, Scheduler, Share
from .costs import StageCosts

NUM_THREADS = 2  # of a server, which form and run batches in turn
BUCKET = 16


@dataclass(slots=True)
class Streams:
    """The stages behind the calling thread, and how long each was busy (s)."""

    costs: StageCosts
    free_at: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)

    def launch(self, at: float, num_pairs: int) -> float:
        """Let a batch that was launched at a time go through; return when its scores are back."""
        for stage in ("upload", "compute", "download"):
            at = self.serve(stage, at, getattr(self.costs, stage).of(num_pairs))
        return at

    def serve(self, stage: str, at: float, seconds: float) -> float:
        """Let one stage do its work as soon as it is free; return when it is through."""
        end = max(at, self.free_at.get(stage, 0.0)) + seconds
        self.free_at[stage] = end
        self.busy[stage] = self.busy.get(stage, 0.0) + seconds
        return end


def request_s(
    costs: StageCosts, num_pairs: int, max_pairs: int, num_slots: int = NUM_SLOTS
) -> float:
    """Return how long one caller's request takes on an idle machine, as `Pipeline.run` goes."""
    streams, thread = Streams(costs), 0.0
    ends: list[float] = []
    for part in even_parts(num_pairs, max_pairs):
        size = part.stop - part.start
        if len(ends) >= num_slots:
            thread = max(thread, ends[-num_slots])
        thread += costs.read.of(size) + costs.launch.of(size)
        ends.append(streams.launch(thread, size))
    return max(thread, ends[-1]) + costs.ask.of(num_pairs)


@dataclass(frozen=True, slots=True)
class Served:
    """What became of the requests of a load.

    Attributes:
        latencies_s: float64 [N], of those that were answered.
        num_refused, num_late: turned away at once; dropped at their deadline.
        seconds: from the first arrival to the last answer.
        utilisation: share of that time that each stage was busy.
        pairs_per_s: scored.
        mean_batch: pairs.
    """

    latencies_s: Float64
    num_refused: int
    num_late: int
    seconds: float
    utilisation: dict[str, float]
    pairs_per_s: float
    mean_batch: float

    def percentile_ms(self, percent: float) -> float:
        """Return a percentile of the latencies."""
        return float(np.percentile(self.latencies_s, percent)) * 1e3


@dataclass(slots=True, eq=False)
class Asked(Job):
    """A request in the simulation: when it came, and how many of its pairs have scores."""

    came: float = 0.0
    num_scored: int = 0


def poisson_arrivals(requests_per_s: float, number: int, seed: int = 0) -> Float64:
    """Return when so many requests come at random: seconds, ascending."""
    gaps = np.random.default_rng(seed).exponential(1 / requests_per_s, number)
    return np.cumsum(gaps)


class Server:
    """A server in the simulation; `run` gives it its requests."""

    def __init__(
        self,
        costs: StageCosts,
        max_pairs: int,
        *,
        front_s: float = 0.0,
        max_wait_s: float = inf,
        timeout_s: float = inf,
        num_threads: int = NUM_THREADS,
    ):
        """Make an idle server.

        Args:
            front_s: of the event loop, a request: half before it is scored, half after.
            max_wait_s, timeout_s: as `ServiceOptions`.
        """
        self._streams = Streams(costs)
        self._costs, self._max_pairs, self._front_s = costs, max_pairs, front_s
        self._max_wait_s, self._timeout_s = max_wait_s, timeout_s
        self._scheduler: Scheduler[Asked] = Scheduler(max_pairs)
        self._idle = num_threads
        self._events: list[tuple[float, int, str, object]] = []
        self._number: Iterator[int] = count()
        self._rate = max_pairs / max(
            costs.compute.of(max_pairs), costs.read.of(max_pairs) + costs.launch.of(max_pairs)
        )
        self._answered: list[float] = []
        self._batches: list[int] = []
        self._refused = self._late = 0

    def run(self, arrivals: Sequence[float] | Float64, candidates: int) -> Served:
        """Let requests of so many candidates arrive at these seconds; return what happens."""
        for at in arrivals:
            self._at(float(at), "arrive", float(at))
        now = 0.0
        while self._events:
            now, _, kind, what = heapq.heappop(self._events)
            if kind == "arrive":
                through = self._streams.serve("front", now, self._front_s / 2)
                self._at(through, "admit", what)
            elif kind == "admit":
                self._admit(now, what, candidates)  # type: ignore[arg-type]
            elif kind == "launch":
                end = self._streams.launch(now, _size(what))  # type: ignore[arg-type]
                self._at(end, "done", what)
            else:
                self._idle += 1
                self._hand_out(now, what)  # type: ignore[arg-type]
            self._take(now)
        seconds = max(now, self._streams.free_at.get("front", 0.0)) - float(arrivals[0])
        return Served(
            latencies_s=np.array(self._answered),
            num_refused=self._refused,
            num_late=self._late,
            seconds=seconds,
            utilisation={name: busy / seconds for name, busy in self._streams.busy.items()},
            pairs_per_s=sum(self._batches) / seconds,
            mean_batch=float(np.mean(self._batches or [0])),
        )

    def _at(self, when: float, kind: str, what: object) -> None:
        heapq.heappush(self._events, (when, next(self._number), kind, what))

    def _admit(self, now: float, came: float, candidates: int) -> None:
        """Let a request wait, or turn it away as `Service` does."""
        if self._scheduler.num_pairs / self._rate > self._max_wait_s:
            self._refused += 1
        else:
            deadline = came + self._timeout_s
            self._scheduler.add(Asked(BUCKET, candidates, deadline, came=came))

    def _take(self, now: float) -> None:
        """Let every idle thread form a batch, read it and launch it."""
        self._late += len(self._scheduler.expire(now))
        while self._idle and (shares := self._scheduler.take()):
            self._idle -= 1
            size = _size(shares)
            self._batches.append(size)
            ready = now + self._costs.read.of(size)
            self._at(
                self._streams.serve("launch", ready, self._costs.launch.of(size)), "launch", shares
            )

    def _hand_out(self, now: float, shares: list[Share[Asked]]) -> None:
        """Answer the requests whose last pairs a batch held."""
        for job, start, stop in shares:
            job.num_scored += stop - start
            if job.num_scored == job.num_pairs:
                behind = self._costs.ask.of(job.num_pairs)
                end = self._streams.serve("front", now, self._front_s / 2) + behind
                self._answered.append(end - job.came)


def _size(shares: list[Share[Asked]]) -> int:
    return sum(stop - start for _, start, stop in shares)
