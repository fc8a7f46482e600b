"""The threads that form batches of what waits, run them, and hand the scores out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from math import inf
from time import monotonic, perf_counter

import numpy as np

from ...errors import EdjeError, EngineError, StoppedError
from ..batcher import PlannedBatch
from ..pipeline import Request, Scored
from ..reranker import Reranker
from ..text import TokenizedQueries
from .answers import Answer, Waiting
from .limits import Load
from .scheduler import Scheduler, Share

_KEPT = 0.8  # of the rate measured so far, at each full batch
# While one batch is computed the next one is read; a third would only be formed too early.
NUM_THREADS = 2
_DONE: Future[Answer] = Future()  # stands in for a request's once that is done
_DONE.cancel()


class Worker:
    """Runs what is added, batch by batch, on threads of its own.

    Attributes:
        on_batch: called after each batch with its `Scored` and the number of its pairs, on the
            thread that ran it.
        on_failure: called with what a batch failed with, before its requests learn of it.
        num_dropped: pairs that were accepted and never scored.
        num_batches: that gave scores.
    """

    def __init__(self, reranker: Reranker, max_pairs: int):
        """Start the threads.

        Raises:
            RuntimeError: the system gave no thread; none is left running.
        """
        self._reranker = reranker
        self._max_pairs = max_pairs
        self._counted = np.arange(max_pairs)  # parts of it are batches' pairs and queries
        self._scheduler: Scheduler[Waiting] = Scheduler(max_pairs)
        self._lock = threading.RLock()  # entered itself: through the condition takes thrice as long
        self._changed = threading.Condition(self._lock)
        self._idle: list[threading.Lock] = []  # of threads with nothing to do: released to wake one
        self._unanswered: set[Waiting] = set()
        self._closing = False
        self._scored_pairs = self._scored_s = self._last_done = 0.0
        self.on_batch: Callable[[Scored, int], None] | None = None
        self.on_failure: Callable[[Exception], None] | None = None
        self.num_dropped = self.num_batches = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"edje-batches-{number}", daemon=True)
            for number in range(NUM_THREADS)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.close(0.0)
            raise

    def add(self, job: Waiting, *, wake: bool = True) -> None:
        """Let a request wait; its future is kept or fails whatever happens.

        Args:
            wake: begin now; False: `wake` will be called.

        Raises:
            EngineError: the worker is closed.
        """
        with self._lock:
            self.check_open()
            self._unanswered.add(job)
            self._scheduler.add(job)
            sleeper = self._idle.pop() if wake and self._idle else None
        if sleeper is not None:
            sleeper.release()
        job.future.add_done_callback(partial(self._forget, job))

    def wake(self) -> None:
        """Begin with what was added."""
        with self._lock:
            sleeper = self._idle.pop() if self._idle else None
        if sleeper is not None:  # not before: it would wait for the lock at once
            sleeper.release()

    def load(self) -> Load:
        """Return what there is to do."""
        rate = self._scored_pairs / self._scored_s if self._scored_s else 0.0
        return Load(len(self._unanswered), self._scheduler.num_pairs, rate)

    def check_open(self) -> None:
        """Raise EngineError once the worker is closed."""
        if self._closing:
            raise _closed()

    def close(self, drain_s: float) -> None:
        """Refuse what comes, finish what was accepted within `drain_s` seconds, end the threads."""
        until = monotonic() + drain_s
        with self._lock:
            self._closing = True
            self._wake_all()
            limit = None if drain_s == inf else max(0.0, until - monotonic())
            self._changed.wait_for(lambda: not self._unanswered, limit)
            left = list(self._unanswered)
        for job in left:
            _fail(job, _closed())
        for thread in self._threads:
            if thread.ident is not None:  # it was started
                thread.join()

    def _work(self) -> None:
        """Form batches and run them, until the service is closed and nothing waits."""
        asleep = threading.Lock()
        asleep.acquire()
        while True:
            sleeper = None
            with self._lock:
                late = self._scheduler.expire(monotonic())
                self.num_dropped += sum(job.num_left for job in late)
                shares = self._scheduler.take()
                if not shares and not late:
                    if self._closing and not self._unanswered:
                        return
                    self._idle.append(asleep)
                elif self._scheduler.num_pairs and self._idle:
                    sleeper = self._idle.pop()  # there is work for the other thread, too
            if not shares and not late:
                asleep.acquire()
                continue
            if sleeper is not None:
                sleeper.release()
            for job in late:
                _fail(job, _too_late(job))
            if shares:
                self._run(shares)

    def _run(self, shares: list[Share[Waiting]]) -> None:
        """Run one batch; when it fails, each request of it alone, so that only the guilty fail."""
        began = perf_counter()
        for job, start, _ in shares:
            if not start and job.stage <= 0:
                job.stages.queue = (began - job.began) * 1e3 - (
                    job.stages.tokenize + job.stages.resolve
                )
        try:
            scored = self._score(shares)
        except Exception as error:
            if len(shares) > 1 and isinstance(error, EdjeError):
                for share in shares:
                    self._run([share])
                return
            if self.on_failure is not None:
                self.on_failure(error)
            for job, _, _ in shares:
                _fail(job, error)
            return
        self._measure(began, len(scored.scores))
        if self.on_batch is not None:
            self.on_batch(scored, len(scored.scores))
        first = 0
        done = []
        with self._lock:  # another batch of the same requests may end now
            for job, start, stop in shares:
                job.take_in(start, scored, slice(first, first + stop - start))
                first += stop - start
                if job.num_scored == job.num_pairs:
                    done.append(job)
        more = [job for job in done if _goes_on(job)]
        if more:  # of cascades: added together, so that they can share a batch
            with self._lock:
                for job in self._unanswered.intersection(more):  # some may have left, or failed
                    self._scheduler.add(job)
            self.wake()
        self._answer([job for job in done if job not in more])

    def _score(self, shares: list[Share[Waiting]]) -> Scored:
        """Score the pairs of several requests together."""
        first, start, stop = shares[0]
        queries, rows = first.queries, first.rows[start:stop]
        if len(shares) > 1:
            each = [share.job.queries for share in shares]
            queries = TokenizedQueries(
                np.concatenate([one.text_ids for one in each]),
                np.concatenate([one.text_length for one in each]),
                np.concatenate([one.truncated for one in each]),
            )
            rows = np.concatenate([job.rows[start:stop] for job, start, stop in shares])
        every = self._counted[: len(shares)]
        query_of_pair = every.repeat([share.stop - share.start for share in shares])
        planned = None
        if first.stage == -1:  # an engine of a cascade may take fewer pairs in a batch
            pairs = self._counted[: len(rows)]
            planned = PlannedBatch(first.bucket, every, query_of_pair.astype(np.int32), pairs)
        request = Request(queries, query_of_pair, rows, planned=planned)
        return self._reranker.score(request, first.stage)

    def _measure(self, began: float, num_pairs: int) -> None:
        """Learn from one batch how many pairs a second are scored.

        One that is half empty because nothing else waited says nothing of that.
        """
        now = perf_counter()
        with self._lock:
            seconds = now - max(began, self._last_done)
            self._last_done = now
            self.num_batches += 1
            if num_pairs * 2 >= self._max_pairs or self._scheduler.num_pairs:
                kept = _KEPT ** min(1.0, num_pairs / self._max_pairs)
                self._scored_pairs = self._scored_pairs * kept + num_pairs
                self._scored_s = self._scored_s * kept + max(seconds, 1e-6)

    def _answer(self, jobs: list[Waiting]) -> None:
        """Rank what was scored; all callers are woken at the end, for they wait for the GIL."""
        answers: list[tuple[Waiting, Answer]] = []
        for job in jobs:
            try:
                answers.append((job, job.answer(self._reranker.labels[0 if job.steps else -1])))
            except Exception as error:
                _fail(job, error)
        for job, answer in answers:
            with suppress(InvalidStateError):  # cancelled meanwhile
                job.future.set_result(answer)

    def _forget(self, job: Waiting, _: object) -> None:
        """A request is answered, failed or cancelled: nothing of it shall be scored any more."""
        job.future = (
            _DONE  # its own holds this very call, and with it the job: the collector's work
        )
        with self._lock:
            num_left = job.num_left
            if num_left and self._scheduler.drop(job):
                self.num_dropped += num_left
            self._unanswered.discard(job)
            if self._closing:
                self._wake_all()

    def _wake_all(self) -> None:
        """Let everyone look again whether it is over; the lock is held."""
        self._changed.notify_all()
        while self._idle:
            self._idle.pop().release()


def _goes_on(job: Waiting) -> bool:
    """Let a cascade say what it wants scored next; return whether it is not at its end."""
    try:
        return job.go_on()
    except Exception as error:
        _fail(job, error)
        return True


def _fail(job: Waiting, error: BaseException) -> None:
    with suppress(Exception):  # answered or cancelled meanwhile
        job.future.set_exception(error)


def _too_late(job: Waiting) -> StoppedError:
    num_asked = len(job.asked.rows)
    num_scored = num_asked if job.stage > 0 else job.num_scored  # all have their first score
    return StoppedError(
        f"the deadline passed with {num_scored:,} of {num_asked:,} pairs scored",
        num_scored=num_scored,
        num_asked=num_asked,
    )


def _closed() -> EngineError:
    return EngineError("the service is closing", hint="send the request again: another takes it")
