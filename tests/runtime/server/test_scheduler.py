"""The rule by which requests share batches: nothing is lost, nobody starves, none is mixed."""

from __future__ import annotations

import random
from collections import defaultdict
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.runtime.server.scheduler import SLICES, Job, Scheduler, Share


def drain(scheduler: Scheduler[Job]) -> list[list[Share[Job]]]:
    batches = []
    while shares := scheduler.take():
        batches.append(shares)
    return batches


def size(shares: list[Share[Job]]) -> int:
    return sum(stop - start for _, start, stop in shares)


def filled(max_pairs: int, *jobs: Job) -> Scheduler[Job]:
    scheduler: Scheduler[Job] = Scheduler(max_pairs)
    for job in jobs:
        scheduler.add(job)
    return scheduler


def test_nothing_waits_nothing_is_taken():
    assert Scheduler(8).take() == []


def test_a_lone_request_is_spread_evenly_over_its_batches():
    job = Job(15, 300, inf)
    assert [size(batch) for batch in drain(filled(256, job))] == [150, 150]


def test_what_waits_together_shares_one_batch_in_the_order_of_deadlines():
    late, soon = Job(15, 3, 20.0), Job(15, 2, 10.0)
    (batch,) = drain(filled(8, late, soon))
    assert [(share.job, share.start, share.stop) for share in batch] == [
        (soon, 0, 2),
        (late, 0, 3),
    ]


def test_a_batch_holds_one_bucket_and_buckets_take_turns():
    large, other = Job(15, 64, 1.0), Job(31, 16, 2.0)
    batches = drain(filled(16, large, other))
    buckets = [batch[0].job.bucket for batch in batches]
    assert buckets == [15, 31, 15, 15, 15]
    assert all(len({share.job.bucket for share in batch}) == 1 for batch in batches)


@pytest.mark.parametrize("bucket", [15, 31])
def test_10_candidates_behind_5000_are_in_the_next_two_batches(bucket):
    scheduler = filled(256, Job(15, 5000, 30.0))
    scheduler.take()
    small = Job(bucket, 10, 31.0)
    scheduler.add(small)
    next_two = [scheduler.take(), scheduler.take()]
    assert (
        sum(share.stop - share.start for b in next_two for share in b if share.job is small) == 10
    )


def test_a_large_request_keeps_its_slice_under_a_flood_of_small_ones():
    large = Job(15, 1000, 5.0)
    scheduler = filled(64, large, *(Job(15, 10, 6.0 + n) for n in range(200)))
    first = scheduler.take()
    assert first[0].job is large
    assert first[0].stop >= 64 // SLICES
    assert len(first) > 1


def test_an_urgent_request_goes_before_every_deadline_and_bucket():
    flood = [Job(bucket, 50, 1.0) for bucket in (15, 31) for _ in range(5)]
    scheduler = filled(16, *flood)
    scheduler.take()
    probe = Job(31, 1, 9.0, urgent=True)
    scheduler.add(probe)
    assert scheduler.take()[0].job is probe


def test_an_expired_request_is_dropped_with_what_waits_of_it():
    gone, stays = Job(15, 100, 1.0), Job(15, 5, 9.0)
    scheduler = filled(16, gone, stays)
    scheduler.take()
    assert scheduler.expire(now=1.0) == [gone]
    assert scheduler.num_pairs == stays.num_left
    assert {share.job for batch in drain(scheduler) for share in batch} <= {stays}


def test_a_dropped_request_is_never_taken_and_dropping_twice_is_no_fault():
    job = Job(15, 5, inf)
    scheduler = filled(16, job)
    assert scheduler.drop(job)
    assert not scheduler.drop(job)
    assert scheduler.take() == []
    assert scheduler.num_pairs == scheduler.num_jobs == 0


def test_steps_for_one_engine_share_batches_and_the_engines_take_turns():
    new = [Job(15, 20, inf, stage=0) for _ in range(2)]
    survivors = [Job(15, 4, inf, stage=1) for _ in range(3)]
    batches = drain(filled(16, *new, *survivors))
    stages = [{share.job.stage for share in batch} for batch in batches]
    assert stages == [{0}, {1}, {0}, {0}]
    assert {share.job for share in batches[1]} == set(survivors)


JOBS = st.lists(
    st.builds(
        Job,
        st.sampled_from([15, 23, 63]),
        st.integers(1, 700),
        st.floats(0, 100),
        stage=st.sampled_from([0, 1]),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(jobs=JOBS, max_pairs=st.integers(1, 256), data=st.data())
def test_every_pair_runs_once_in_order_whatever_comes_when(jobs, max_pairs, data):
    scheduler: Scheduler[Job] = Scheduler(max_pairs)
    waiting, dropped = list(jobs), set()
    covered: dict[Job, int] = defaultdict(int)
    while True:
        for _ in range(data.draw(st.integers(0, 3))):
            if waiting:
                scheduler.add(waiting.pop())
        if jobs and data.draw(st.integers(0, 9)) == 0:
            job = jobs[data.draw(st.integers(0, len(jobs) - 1))]
            if scheduler.drop(job):
                dropped.add(job)
        shares = scheduler.take()
        assert size(shares) <= max_pairs
        assert len({share.job.bucket for share in shares}) <= 1
        for job, start, stop in shares:
            assert start == covered[job] < stop <= job.num_pairs
            assert job not in dropped
            covered[job] = stop
        if not shares and not waiting:
            break
    assert scheduler.num_pairs == 0
    assert all(covered[job] == job.num_pairs for job in jobs if job not in dropped)


def simulate(arrivals: list[tuple[float, Job]], max_pairs: int, pairs_per_s: float) -> dict:
    """Run a trace through an engine of known speed; return when each job was done."""
    scheduler: Scheduler[Job] = Scheduler(max_pairs)
    now, done, left = 0.0, {}, sorted(arrivals, key=lambda one: one[0])
    while left or scheduler.num_pairs:
        while left and left[0][0] <= now:
            scheduler.add(left.pop(0)[1])
        scheduler.expire(now)
        shares = scheduler.take()
        if not shares:
            now = left[0][0] if left else now
            if not left:
                break
            continue
        now += 0.002 + size(shares) / pairs_per_s
        for job, _, stop in shares:
            if stop == job.num_pairs:
                done[job] = now
    return done


def trace(seed: int, requests_per_s: float, seconds: float, timeout: float) -> list:
    """Arrivals as a shop's search sends them: many of 30 to 100 candidates, a few of 2,000."""
    chance, now, found = random.Random(seed), 0.0, []
    while now < seconds:
        now += chance.expovariate(requests_per_s)
        number = 2000 if chance.random() < 0.01 else chance.randint(30, 100)
        found.append((now, Job(chance.choice([15, 15, 15, 23]), number, now + timeout)))
    return found


def test_below_capacity_every_request_of_a_trace_is_done_in_time():
    arrivals = trace(seed=1, requests_per_s=60, seconds=20, timeout=5.0)
    done = simulate(arrivals, max_pairs=256, pairs_per_s=8000)
    assert len(done) == len(arrivals)
    waits = sorted(done[job] - at for at, job in arrivals if job.num_pairs <= 100)
    assert waits[len(waits) // 2] < 0.15
    assert waits[-1] < 1.0


def test_at_twice_the_capacity_the_engine_works_for_answers_that_still_count():
    arrivals = trace(seed=2, requests_per_s=190, seconds=20, timeout=2.0)
    done = simulate(arrivals, max_pairs=256, pairs_per_s=8000)
    in_time = [job for at, job in arrivals if job in done and done[job] <= job.deadline + 0.1]
    assert len(in_time) == len(done), "a batch was spent on what nobody waits for"
    capacity = 256 / (0.002 + 256 / 8000) * 20
    assert sum(job.num_pairs for job in in_time) > 0.75 * capacity
