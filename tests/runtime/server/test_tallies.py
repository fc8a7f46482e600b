"""Figures that are summed up when somebody looks: the same as prometheus_client's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from edje.runtime.server import tallies
from edje.runtime.server.tallies import Tally

BOUNDS = (0.001, 0.25, 1.0, 30.0)


class Both(Collector):
    """Shows a tally's histogram of two stages, and the sum of its last column."""

    def __init__(self, tally: Tally):
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        yield self._tally.histogram("stage_seconds", "Time.", [0, 1], "stage", ["read", "write"])
        yield self._tally.counter(2, "pairs", "Pairs.")


def lines(registry: CollectorRegistry) -> list[str]:
    text = generate_latest(registry).decode()
    return [line for line in text.splitlines() if "_created" not in line]


@pytest.mark.parametrize("most", [1, 7, 10_000])
def test_a_tally_tells_what_prometheus_client_does(monkeypatch: pytest.MonkeyPatch, most: int):
    monkeypatch.setattr(tallies, "MOST_NOTED", most)
    random = np.random.default_rng(0)
    own, theirs = CollectorRegistry(), CollectorRegistry()
    tally = Tally([BOUNDS, BOUNDS, ()])
    own.register(Both(tally))
    stages = Histogram("stage_seconds", "Time.", ["stage"], buckets=BOUNDS, registry=theirs)
    read, write = stages.labels("read"), stages.labels("write")
    pairs = Counter("pairs", "Pairs.", registry=theirs)
    assert lines(own) == lines(theirs)  # from 0 on: Prometheus sees no rise in a first sample
    values = [0.0, *BOUNDS, 31.0, *np.round(random.exponential(1.0, 50) * 64) / 64]
    for value in values:  # sums of 64ths are exact in any order
        exact = round(value * 64) / 64 if value > 0.1 else value
        tally.note(exact, 2 * exact, 3)
        read.observe(exact)
        write.observe(2 * exact)
        pairs.inc(3)
    assert lines(own) == lines(theirs)


def test_nothing_is_lost_or_counted_twice_by_many_threads():
    tally = Tally([BOUNDS])

    def work() -> None:
        for number in range(5000):
            tally.note(0.5)
            if number % 500 == 0:
                tally.counter(0, "all", "All.")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (sample,) = tally.counter(0, "all", "All.").samples
    assert sample.value == 4 * 5000 * 0.5
