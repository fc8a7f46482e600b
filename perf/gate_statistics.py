"""Is head slower than base? What ratios of minima say, how surely, and when to stop asking.

A launch is one pair of processes that take turns; it gives one ratio: the head's least time over
the base's. Ratios of the same code scatter by about one per cent from launch to launch (where
memory comes to lie), more where others use the machine. So launches are added until the interval
of the mean says on which side of the limit it lies: a sequential test, cheap where the case is
clear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Literal

Decision = Literal["slower", "fine", "open"]

CONFIDENCE = 0.99  # of the interval, two-sided
# What is known before the first launch: four ratios of the same code that scatter by 1 %
# (measured: 0.5 to 1 % on an idle machine, to 2.7 % under four times its load). It keeps launches
# that agree by chance from counting as certain.
PRIOR_SPREAD, PRIOR_LAUNCHES = 0.01, 4
# A process of the server is a tenth faster than others of the same code, one in twelve (measured):
# of five launches such a one on either side is left out.
MIN_LAUNCHES, MAX_LAUNCHES = 5, 10
# Of the runs: the very least is a freak now and then, 20 % below all others (a thread that happened
# to wait on the right core) or 4 % (a CPU clock that ticked too few).
LEAST_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Estimate:
    """How many times the base's time the head takes.

    Attributes:
        ratio: the trimmed geometric mean of the launches' ratios.
        low, high: its interval at `CONFIDENCE`.
        num_launches: it stands on.
    """

    ratio: float
    low: float
    high: float
    num_launches: int

    def decision(self, limit: float) -> Decision:
        """Return on which side of 1 + `limit` the whole interval lies; `open` where on both."""
        if self.low > 1 + limit:
            return "slower"
        return "fine" if self.high < 1 + limit else "open"

    def sees(self, limit: float) -> float:
        """Return the least slowdown (0.08: 8 %) that would lie beyond the limit for certain."""
        return (1 + limit) * math.sqrt(self.high / self.low) - 1


def estimate(ratios: Sequence[float]) -> Estimate:
    """Return what the ratios of one or more launches say together.

    The mean leaves out the least and the greatest fifth: a launch that met a bad place in memory
    may lie ten per cent off. The interval is Yuen's, of winsorized values.

    Raises:
        ValueError: there is none, or one is not positive and finite.
    """
    if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
        raise ValueError(f"ratios are {list(ratios)}, expected positive numbers")
    logs = sorted(math.log(ratio) for ratio in ratios)
    num, cut = len(logs), len(logs) // 5
    kept = logs[cut : num - cut]
    pulled = [*[kept[0]] * cut, *kept, *[kept[-1]] * cut]
    squares = sum((value - fmean(pulled)) ** 2 for value in pulled)
    freedom = PRIOR_LAUNCHES + len(kept) - 1
    variance = (PRIOR_LAUNCHES * PRIOR_SPREAD**2 + squares) / freedom
    error = math.sqrt(variance / num) * num / len(kept)
    half, mean = student_quantile((1 + CONFIDENCE) / 2, freedom) * error, fmean(kept)
    return Estimate(math.exp(mean), math.exp(mean - half), math.exp(mean + half), num)


def decide(ratios: Sequence[float], limit: float, max_launches: int = MAX_LAUNCHES) -> Decision:
    """Return the decision after these launches; `open` asks for another one.

    After `max_launches` the ratio decides: who cannot tell takes what is more likely.
    """
    if len(ratios) < min(MIN_LAUNCHES, max_launches):
        return "open"
    found = estimate(ratios)
    decision = found.decision(limit)
    if decision == "open" and len(ratios) >= max_launches:
        return "slower" if found.ratio > 1 + limit else "fine"
    return decision


def least(times: Sequence[float]) -> float:
    """Return the least of the times but for the lowest `LEAST_SHARE`: others can only add."""
    return sorted(times)[int(LEAST_SHARE * len(times))]


def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution.

    Cornish and Fisher's expansion from the normal distribution; within 1 % from 4 degrees of
    freedom on, up to the probability 0.995. Source: Abramowitz and Stegun 26.7.5.
    """
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
