"""Choose how to quantise by what it does to the ranking, and keep in 16 bit what must be kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import EngineError
from ..agreement import Agreement
from ..contract import Progress
from ..fidelity import FidelityLimits
from ..scales import ONLY_STATIC, Scales
from .emulate import Switches, scorer
from .graph import Graph
from .lower import Lowering, lower
from .schemes import SMOOTHED, Observed, Scheme, scheme_of
from .trials import EFFECT_PAIRS, OBSERVED_PAIRS, CalibrationPairs, Query, shares

# Where every way breaks the ranking, which one breaks it least is chance: the scores' error tells.
TELLING_TAU = 0.5
# Some queries' tau differs from that of all by less: what lies further below breaks the limits.
PLAINLY = 0.03


@dataclass(frozen=True, slots=True)
class Choice:
    """A quantised graph and why it is as it is.

    Attributes:
        graph: quantised, everything else in the compute type.
        scales: the way of scaling, of those that were offered.
        kept: layer groups that stay in the compute type, in the order of the search.
        agreement: with the float32 graph on the calibration pairs.
        facts: how it was found, for the manifest.
    """

    graph: Graph
    scales: Scales
    kept: tuple[str, ...]
    agreement: Agreement
    facts: Mapping[str, Any]


def choose(
    graph: Graph,
    queries: Sequence[Query],
    precision: str,
    compute_type: str,
    limits: FidelityLimits,
    progress: Progress,
    *,
    scales: Sequence[Scales] = ONLY_STATIC,
    lowering: Lowering = lower,
) -> Choice:
    """Quantise `graph` so that the ranking of `queries` holds `limits`.

    For each way of scaling: the way to choose scales (and, where channels stand out, to smooth
    them) that agrees best with float32; then, while a limit is broken, more layer groups kept in
    `compute_type`, those first that move the scores most, for their time, when quantised alone.
    What is compared is compared on some queries, what is taken holds the limits on all. Of several
    ways of scaling it takes the one whose products cost least by the backend's estimate, kept ones
    included.

    Args:
        scales: ways of scaling activations that the backend offers.
        lowering: what brings the rest of a graph into `compute_type`.

    Raises:
        EngineError: the limits do not hold even with only one layer group quantised.
    """
    schemes = [scheme_of(each) for each in scales]  # refuses before any work
    pairs = CalibrationPairs(graph, queries, progress)
    observed = Observed(graph, shares(queries, OBSERVED_PAIRS))
    types = precision, compute_type
    effects: dict[str, dict[str, float]] = {}
    ways = [
        _Search(kind(graph, *types, observed, each), pairs, *types, limits, effects, lowering)
        for kind, each in zip(schemes, scales, strict=True)
    ]
    ways.sort(key=lambda way: way.scheme.cost())
    return _best_first(ways) if limits.max_rescored is not None else _cheapest(ways, progress)


def _best_first(ways: Sequence[_Search]) -> Choice:
    """Quantise everything, in the way with which a cascade takes least time.

    What products cost, and the share of the candidates that must be scored again, add up.
    """
    tries = [
        (way, way.best_method(sum(more.most_pairs for more in ways[number:])))
        for number, way in enumerate(ways)
    ]
    holding = [(way, best) for way, best in tries if way.holds(best)]
    if not holding:
        raise EngineError(
            f"{ways[0].precision} is no first stage for this model: it rules out too little",
            faults=[f"{way.what}: {fault}" for way, best in tries for fault in way.faults(best)],
            hint="build with --precision fp16, bf16 or fp32, or set the limits lower",
        )
    way, best = min(holding, key=lambda found: found[1].cost + found[1].agreement.rescored)
    tried = [attempt.to_json() for each in ways for attempt in each.tried]
    again = f"a cascade would rescore {best.agreement.rescored:.1%}"
    return way.choice(best, tried, f"products cost {best.cost:.2f}, {again}: together the least")


def _cheapest(ways: Sequence[_Search], progress: Progress) -> Choice:
    """Go through the ways, cheapest first, until one holds; then see what keeping gives others."""
    broken: list[_Search] = []
    found: tuple[_Search, Try] | None = None
    for way in ways:
        best = way.best_method(sum(more.most_pairs for more in ways[ways.index(way) :]))
        if way.holds(best):
            found = way, best
            break
        broken.append(way)
    for way in reversed(broken):  # the most faithful first: its cost bounds the others' search
        kept = way.fewest_kept(below=found[1].cost if found else math.inf)
        found = (way, kept) if kept is not None else found
    if found is None:
        raise ways[-1].refusal()
    tried = [attempt.to_json() for way in ways for attempt in way.tried]
    return found[0].choice(found[1], tried, _reason(found, ways))


def _reason(found: tuple[_Search, Try], ways: Sequence[_Search]) -> str:
    """Say why this way of scaling was taken."""
    way, taken = found
    if len(ways) == 1:
        return "the backend offers no other scales"
    others = [
        f"{each.scheme.scales.words}, everything quantised: would cost "
        f"{each.scheme.cost():.2f}, {'breaks them' if each.tried else 'not needed'}"
        for each in ways
        if each is not way
    ]
    costs = f"products cost {taken.cost:.2f} of the compute type's, the least that hold the limits"
    return "; ".join([costs, *others])


@dataclass(frozen=True, slots=True)
class Try:
    """One way to quantise and what came of it, on so many pairs as the agreement says."""

    scales: str
    form: str
    method: str
    kept: tuple[str, ...]
    cost: float
    agreement: Agreement

    def to_json(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        names = ("num_pairs", "kendall_tau", "top_1", "mean_abs_diff", "max_abs_diff", "rescored")
        figures = {name: round(getattr(self.agreement, name), 6) for name in names}
        kept = {"kept": len(self.kept)} if self.kept else {}
        way = f"{self.method}, smoothed" if self.form == SMOOTHED else self.method
        cost = {"cost": round(self.cost, 4)}
        return {"scales": self.scales, "method": way, **kept, **cost, **figures}


class _Search:
    """The search in one way of scaling."""

    def __init__(
        self,
        scheme: Scheme,
        pairs: CalibrationPairs,
        precision: str,
        compute_type: str,
        limits: FidelityLimits,
        effects: dict[str, dict[str, float]],
        lowering: Lowering,
    ):
        """Search among `pairs`; `effects`, by kind of scales, are shared between searches."""
        self.scheme, self.pairs, self.limits = scheme, pairs, limits
        self.precision, self.compute_type, self.lowering = precision, compute_type, lowering
        self._effects, self.effects = effects, dict[str, float]()
        self.tried: list[Try] = []
        self.lead = 0.0  # by how much tau on all queries is higher than on some
        self.best: Try | None = None
        self._on_some: dict[int, Agreement] = {}  # by how many are kept

    @property
    def what(self) -> str:
        return f"{self.precision}, {self.scheme.scales.words}"

    @property
    def most_pairs(self) -> int:
        """Pairs that this search may score: comparing, effects, five steps, three last words."""
        some, every = (self.pairs.num_pairs(each) for each in (self.pairs.some, self.pairs.every))
        ways = len(self.scheme.forms) * len(self.scheme.methods)
        return (ways + 5) * some + len(self.scheme.groups) * EFFECT_PAIRS + 3 * every

    def best_method(self, ahead: int) -> Try:
        """Try every form and method with everything quantised; the best on all pairs, too."""
        self.pairs.ahead = ahead
        some, tried = self.pairs.some, []
        for form in self.scheme.forms:
            for method in self.scheme.methods:
                self.pairs.tell(f"calibrating {self.what}: {method}, {form}")
                tried.append(self.attempt(form, method, (), some))
        best = max(tried, key=lambda t: (t.agreement.kendall_tau, -t.agreement.mean_abs_diff))
        if best.agreement.kendall_tau < TELLING_TAU:
            best = min(tried, key=lambda t: t.agreement.mean_abs_diff)
        self.best = best
        if self.plainly_broken(best) or len(some) == len(self.pairs.every):
            return best
        self.pairs.tell(f"calibrating {self.what}: {best.method} on all pairs")
        whole = self.attempt(best.form, best.method, (), self.pairs.every)
        self.lead = whole.agreement.kendall_tau - best.agreement.kendall_tau
        return whole

    def fewest_kept(self, below: float) -> Try | None:
        """Keep more and more layer groups until the limits hold; then as few as they allow.

        Args:
            below: products must cost less than this; None is returned where they would not.
        """
        best = self.best
        assert best is not None
        switches = self.scheme.switches(best.form, best.method)
        kind = self.scheme.scales.kind
        if kind not in self._effects:
            self._effects[kind] = self.pairs.effects(switches.score, switches.groups)
        self.effects = self._effects[kind]
        order = sorted(self.effects, key=self.gain, reverse=True)
        most = sum(self.scheme.cost(order[:n]) < below for n in range(1, len(order)))
        if not most or (below < math.inf and not self.promises(order[:most], switches)):
            return None
        return self.last_word(order, most, switches)

    def gain(self, group: str) -> float:
        """Return how much keeping a layer group calms the scores, for the time that it takes.

        What groups do to the scores adds up in squares. The last layer's products read one row a
        pair: kept, they cost next to nothing.
        """
        return self.effects[group] ** 2 / self.scheme.share(group)

    def last_word(self, order: Sequence[str], most: int, switches: Switches) -> Try | None:
        """Score the graph itself on all pairs, until one more layer group holds and one less not.

        Every verdict also says how far some pairs are from all, and so where to look next.
        """
        low, high = 0, most + 1  # the former breaks the limits, the latter holds or is too many
        found: Try | None = None
        while high - low > 1:
            number = self.fewest_promised(order, low, high, switches)
            attempt = self.attempt_all(order[:number])
            if self.holds(attempt):
                high, found = number, attempt
            else:
                low = number
            some = self.agreement_on_some(order[:number], switches)
            self.lead = attempt.agreement.kendall_tau - some.kendall_tau
        return found

    def fewest_promised(self, order: Sequence[str], low: int, high: int, switches: Switches) -> int:
        """Return how many to keep, more than `low` and less than `high`, for all pairs to hold."""
        last = high - 1
        while last - low > 1:
            middle = (low + last) // 2
            promises = self.promises(order[:middle], switches)
            low, last = (low, middle) if promises else (middle, last)
        return last

    def promises(self, kept: Sequence[str], switches: Switches) -> bool:
        """Tell whether all pairs would hold the limits with all but `kept` quantised, about."""
        agreement = self.agreement_on_some(kept, switches)
        tau = min(1.0, agreement.kendall_tau + self.lead)
        return not self.limits.broken_by(replace(agreement, kendall_tau=tau))

    def agreement_on_some(self, kept: Sequence[str], switches: Switches) -> Agreement:
        """Score some pairs, once, with all but `kept` quantised; leaves the compute type out."""
        if len(kept) in self._on_some:
            return self._on_some[len(kept)]
        self.pairs.tell(f"{self.what}: keeping {len(kept)} of {len(switches.groups)} layer groups")
        quantized = [group for group in switches.groups if group not in kept]
        agreement = self.pairs.agreement(
            lambda batch: switches.score(batch, quantized), self.pairs.some
        )
        best, cost = self.best, self.scheme.cost(kept)
        assert best is not None
        self.tried.append(replace(best, kept=tuple(kept), cost=cost, agreement=agreement))
        self._on_some[len(kept)] = agreement
        return agreement

    def attempt_all(self, kept: Sequence[str]) -> Try:
        """Quantise all but `kept` as the best method does and score all pairs."""
        best, groups = self.best, len(self.scheme.groups)
        assert best is not None
        self.pairs.tell(
            f"{self.what}: keeping {len(kept)} of {groups} layer groups in {self.compute_type}, "
            "all pairs"
        )
        return self.attempt(best.form, best.method, tuple(kept), self.pairs.every)

    def attempt(self, form: str, method: str, kept: tuple[str, ...], numbers: Sequence[int]) -> Try:
        """Quantise and score; note what came of it."""
        agreement = self.pairs.agreement(scorer(self.quantized(form, method, kept)), numbers)
        words, cost = self.scheme.scales.words, self.scheme.cost(kept)
        result = Try(words, form, method, kept, cost, agreement)
        self.tried.append(result)
        return result

    def quantized(self, form: str, method: str, kept: Sequence[str]) -> Graph:
        typed = self.scheme.quantized(form, method, kept)
        return typed if self.compute_type == "float32" else self.lowering(typed, self.compute_type)

    def holds(self, attempt: Try) -> bool:
        return not self.limits.broken_by(attempt.agreement)

    def plainly_broken(self, attempt: Try) -> bool:
        """Tell whether some pairs are so far off that all cannot hold the limits."""
        least = self.limits.min_kendall_tau
        return least is not None and attempt.agreement.kendall_tau < least - PLAINLY

    def faults(self, attempt: Try) -> list[str]:
        """Return one sentence for every limit that an attempt breaks."""
        return self.limits.broken_by(attempt.agreement)

    def refusal(self) -> EngineError:
        """Return the error that says what breaks with all layer groups but one kept."""
        return EngineError(
            f"{self.precision} does not hold the fidelity limits, even with all layer groups "
            f"but one kept in {self.compute_type}",
            faults=self.limits.broken_by(self.tried[-1].agreement),
            hint="build with --precision fp16, bf16 or fp32, or set the limits lower",
        )

    def choice(self, chosen: Try, tried: list[dict[str, Any]], reason: str) -> Choice:
        """Make the graph of `chosen`."""
        facts = {
            **self.scheme.facts(),
            "method": chosen.method,
            "smoothed": self.scheme.outliers(chosen.kept) if chosen.form == SMOOTHED else {},
            "kept": {
                group: {
                    "mean_abs_diff": self.effects[group],
                    "share_of_products": self.scheme.share(group),
                }
                for group in chosen.kept
            },
            "cost": round(chosen.cost, 4),
            "chosen": reason,
            "tried": tried,
        }
        graph = self.quantized(chosen.form, chosen.method, chosen.kept)
        return Choice(graph, self.scheme.scales, chosen.kept, chosen.agreement, facts)
