"""What the launches and the counters of both sides come to: verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean

from .gate_statistics import Decision, Estimate, decide, estimate
from .gate_turns import Launch, Launched
from .verdicts import Status, Verdict

# What differs though nothing is wrong: an object that comes from a list of free ones, or does not.
SLACK = {"allocated_blocks": 3, "peak_bytes": 256}
MEASURES = {"wall": "time", "cpu": "cpu time"}

Ranges = Mapping[str, Sequence[int]]


@dataclass(slots=True)
class Measurement:
    """The launches of one stage."""

    launches: list[Launch] = field(default_factory=list)

    def ratios(self, measure: str) -> list[float]:
        """Return the head's time over the base's, launch by launch."""
        return [float(getattr(one, measure)) for one in self.launches]

    def estimate(self, measure: str) -> Estimate:
        """Return what they say together."""
        return estimate(self.ratios(measure))

    def decision(self, limit: float, max_launches: int) -> Decision:
        """Return `slower` where either measure says so, `fine` where both do."""
        found = {decide(self.ratios(measure), limit, max_launches) for measure in MEASURES}
        if "slower" in found:
            return "slower"
        return "open" if "open" in found else "fine"


def time_verdicts(
    first: Mapping[str, Measurement],
    again: Sequence[Mapping[str, Measurement]],
    limit: float,
    max_launches: int,
) -> list[Verdict]:
    """Return two verdicts a stage: wall time and CPU time. Worse is what most measurements say.

    Args:
        first: of every stage.
        again: of those that seemed slower, and of those of them where the two disagree.
        limit, max_launches: see `decide`.
    """
    verdicts = []
    for stage, found in first.items():
        for kind, name in MEASURES.items():
            side = "base_s" if kind == "wall" else "base_cpu_s"
            base = geometric_mean([getattr(one, side) for one in found.launches])
            measured = [found, *(each[stage] for each in again if stage in each)]
            estimates = [one.estimate(kind) for one in measured]
            decisions = [decide(one.ratios(kind), limit, max_launches) for one in measured]
            status: Status = "ok"
            if len(decisions) > 1 and decisions.count("slower") * 2 > len(decisions):
                status = "worse"
            elif estimates[0].high < 1 / (1 + limit):
                status = "better"
            head = base * estimates[0].ratio
            note = ", then ".join(_said(one, limit) for one in estimates)
            verdicts.append(Verdict(stage, name, base, head, "s", f"{limit:.1%}", status, note))
    return verdicts


def missing_stages(launched: Launched) -> list[Verdict]:
    """Return what only one side has."""
    return [
        *(Verdict(one, "stage", 1, None, "", "", "missing") for one in launched.only_base),
        *(Verdict(one, "stage", None, 1, "", "", "new") for one in launched.only_head),
    ]


def counter_verdicts(
    base: Mapping[str, Ranges], head: Mapping[str, Ranges], allowed: Mapping[str, float]
) -> list[Verdict]:
    """Compare the counters of the stages that both have.

    The head's least must exceed the base's greatest by more than is allowed and `SLACK`: where
    both are the same in every run and the counter has none, one more is enough.
    """
    verdicts = []
    for stage, ranges in base.items():
        for name, (low, high) in ranges.items():
            if stage not in head or name not in head[stage]:
                continue
            least, most = head[stage][name]
            share = allowed.get(f"{stage}.{name}", allowed.get(name, 0.0))
            status: Status = "ok"
            if least > high * (1 + share) + SLACK.get(name, 0):
                status = "worse"
            elif most < low - SLACK.get(name, 0):
                status = "better"
            note = (
                "" if low == high and least == most else f"{low:,}..{high:,}; {least:,}..{most:,}"
            )
            verdicts.append(Verdict(stage, name, low, least, "", f"{share:.3g}", status, note))
    return verdicts


def joined(first: Ranges, second: Ranges) -> Ranges:
    """Return the ranges that hold both, of the counters that both have."""
    return {
        name: (min(low, second[name][0]), max(high, second[name][1]))
        for name, (low, high) in first.items()
        if name in second
    }


def telling(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Leave out the counters that did not move."""
    return [one for one in verdicts if one.status != "ok" or one.field in MEASURES.values()]


def _said(found: Estimate, limit: float) -> str:
    return (
        f"{found.ratio - 1:+.1%} ({found.low - 1:+.1%} to {found.high - 1:+.1%}, "
        f"{found.num_launches} launches; sees {found.sees(limit):.1%})"
    )
