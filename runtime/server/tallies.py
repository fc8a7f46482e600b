"""Histograms and counters that are noted for the price of an append, and summed up when asked for.

prometheus_client's own take a lock and half a microsecond to two for each value, of which a request
has six and a batch eight.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from ...arrays import Float64

MOST_NOTED = 1_000  # rows (of 400 bytes) that wait to be summed up, where nobody asks


class Tally:
    """Rows of numbers, whose columns are summed up and counted by buckets. Safe from any thread."""

    def __init__(self, bounds: Sequence[Sequence[float]]):
        """`bounds`: upper ones of each column's buckets, ascending; none: only the sum."""
        self._bounds = [np.array(each, np.float64) for each in bounds]
        self._noted: deque[tuple[float, ...]] = deque()
        self._counts = [np.zeros(len(each) + 1, np.int64) for each in bounds]
        self._sums: Float64 = np.zeros(len(bounds))
        self._summing = threading.Lock()

    def note(self, *row: float) -> None:
        """Note one row: a number for each column."""
        self._noted.append(row)
        if len(self._noted) > MOST_NOTED:
            self._sum_up()

    def counter(self, column: int, name: str, what: str) -> Metric:
        """Return a column's sum as Prometheus takes it."""
        self._sum_up()
        return CounterMetricFamily(name, what, value=float(self._sums[column]))

    def histogram(
        self,
        name: str,
        what: str,
        columns: Sequence[int],
        label: str = "",
        values: Sequence[str] = (),
    ) -> HistogramMetricFamily:
        """Return columns of equal bounds as Prometheus takes them.

        Args:
            label: its name, where `values` tell the columns apart.
        """
        self._sum_up()
        family = HistogramMetricFamily(name, what, labels=[label] if label else None)
        for number, column in enumerate(columns):
            family.add_metric(
                [values[number]] if label else [],
                list(self._buckets(column)),
                float(self._sums[column]),
            )
        return family

    def _buckets(self, column: int) -> Iterator[tuple[str, float]]:
        """Yield each bound, and how many values do not lie above it."""
        bounds = [*map(float, self._bounds[column]), float("inf")]
        for bound, number in zip(bounds, self._counts[column].cumsum().tolist(), strict=True):
            yield floatToGoString(bound), number  # type: ignore[no-untyped-call]

    def _sum_up(self) -> None:
        """Take in what was noted so far."""
        with self._summing:
            rows = [self._noted.popleft() for _ in range(len(self._noted))]
            if not rows:
                return
            for column, values in enumerate(np.array(rows, np.float64).T):
                self._sums[column] += values.sum()
                places = np.searchsorted(self._bounds[column], values)
                self._counts[column] += np.bincount(places, minlength=len(self._counts[column]))
