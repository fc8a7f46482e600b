"""Which pairs run next: requests of many callers share batches. Pure: no clock, no I/O, no lock.

A batch is what waits when the engine can take one: nothing is ever held back to fill it.

- A batch holds one text bucket and one engine of a cascade. The buckets with something waiting,
  and in each the engines, take turns.
- Within a bucket the request whose deadline comes first goes first, but takes at most a quarter of
  the batch before everyone else had a quarter: 10 candidates never wait behind 5,000.
- What waits is spread evenly over the batches that it needs: 300 pairs with room for 256 become
  150 and 150.
- A request whose deadline has passed, or whose caller has left, is dropped before it costs work.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

SLICES = 4  # into so many parts a batch is cut, of which a request gets one before its second


@dataclass(slots=True, eq=False)
class Job:
    """One request's pairs, as far as the scheduler sees them.

    Attributes:
        bucket: text slots T of its query.
        num_pairs: how many it asks for.
        deadline: when the caller stops waiting, on the clock of `Scheduler.take`; inf: never.
        stage: which engine of a cascade scores them; -1: the last one, or the only one.
        urgent: goes before all others (a probe).
        num_taken: pairs that were given to batches.
    """

    bucket: int
    num_pairs: int
    deadline: float
    stage: int = -1
    urgent: bool = False
    num_taken: int = 0

    @property
    def num_left(self) -> int:
        """Pairs that still wait."""
        return self.num_pairs - self.num_taken

    @property
    def queue(self) -> Queue:
        """Those that may share batches with it have the same."""
        return self.stage, self.bucket


Queue = tuple[int, int]
AnyJob = TypeVar("AnyJob", bound=Job)


class Share(NamedTuple, Generic[AnyJob]):
    """The pairs `start` to `stop` of a job, which run in one batch."""

    job: AnyJob
    start: int
    stop: int


class Scheduler(Generic[AnyJob]):
    """The pairs that wait, and the rule by which they become batches. One thread at a time."""

    def __init__(self, max_pairs: int):
        """`max_pairs`: room in a batch."""
        self._max_pairs = max_pairs
        self._slice = max(1, max_pairs // SLICES)
        self._waiting: dict[Queue, list[AnyJob]] = {}  # the earliest deadline first
        self._pairs: dict[Queue, int] = {}  # that wait
        self._turns: dict[Queue, int] = {}  # when a queue had its last batch
        self._turn = 0
        self.num_pairs = 0

    @property
    def num_jobs(self) -> int:
        """Requests with pairs that wait."""
        return sum(map(len, self._waiting.values()))

    def add(self, job: AnyJob) -> None:
        """Let a job's pairs wait."""
        jobs = self._waiting.setdefault(job.queue, [])
        if jobs and _order(jobs[-1]) > _order(job):
            insort(jobs, job, key=_order)
        else:  # most come in the order of their deadlines
            jobs.append(job)
        self._count(job, job.num_left)

    def drop(self, job: AnyJob) -> bool:
        """Take a job's waiting pairs out; return whether there were any."""
        jobs = self._waiting.get(job.queue, [])
        if not job.num_left or job not in jobs:
            return False
        self._leave(jobs, (job,))
        return True

    def expire(self, now: float) -> list[AnyJob]:
        """Take out and return the jobs whose deadline has passed."""
        late: list[AnyJob] = []
        for jobs in list(self._waiting.values()):
            leaving = list(_until(jobs, now))
            late += leaving
            self._leave(jobs, leaving)
        return late

    def take(self) -> list[Share[AnyJob]]:
        """Return the next batch; empty where nothing waits."""
        queues = [queue for queue, jobs in self._waiting.items() if jobs]
        if not queues:
            return []
        self._turn += 1
        queue = min(queues, key=self._next)
        self._turns[queue] = self._turn
        jobs = self._waiting[queue]
        shares, num_pairs = [], 0
        for job, count in self._divide(jobs, self._pairs[queue]).items():
            start = job.num_taken
            job.num_taken = stop = start + count
            shares.append(Share(job, start, stop))
            num_pairs += count
            if stop == job.num_pairs:
                jobs.remove(job)  # one of the first
        self.num_pairs -= num_pairs
        self._pairs[queue] -= num_pairs
        return shares

    def _divide(self, jobs: list[AnyJob], waiting: int) -> dict[AnyJob, int]:
        """Return how many pairs each job gets of one batch: a slice each, then the rest in line.

        `waiting` is how many pairs they have all together.
        """
        num_batches = -(-waiting // self._max_pairs)
        room = -(-waiting // num_batches)
        counts: dict[AnyJob, int] = {}
        for limit in (self._slice, self._max_pairs):
            for job in jobs:
                if not room:
                    return counts
                had = counts.get(job, 0)
                more = min(room, limit, job.num_left - had)
                if more:
                    counts[job] = had + more
                    room -= more
        return counts

    def _next(self, queue: Queue) -> tuple[bool, int, float]:
        """Return a key: the smallest is the queue whose turn it is."""
        first = self._waiting[queue][0]
        return not first.urgent, self._turns.get(queue, 0), first.deadline

    def _leave(self, jobs: list[AnyJob], leaving: Iterable[AnyJob]) -> None:
        for job in list(leaving):
            jobs.remove(job)
            self._count(job, -job.num_left)

    def _count(self, job: AnyJob, more: int) -> None:
        """Count more pairs of a job as waiting, or fewer."""
        self.num_pairs += more
        self._pairs[job.queue] = self._pairs.get(job.queue, 0) + more


def _order(job: Job) -> tuple[bool, float]:
    return not job.urgent, job.deadline


def _until(jobs: Iterable[AnyJob], now: float) -> Iterator[AnyJob]:
    """Yield the jobs whose deadline has passed: but for urgent ones, they come first."""
    for job in jobs:
        if job.deadline <= now:
            yield job
        elif not job.urgent:
            return
