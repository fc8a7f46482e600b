"""Choose how to quantise by what it does to the ranking, and keep in 16 bit what must be kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...arrays import Float32
from ...errors import EngineError
from ..agreement import Agreement, rank_agreement
from ..contract import STATIC, Batch, Progress
from ..fidelity import FidelityLimits
from .emulate import Switches, scorer
from .graph import Graph
from .lower import lower
from .schemes import SMOOTHED, Scheme, scheme_of

Query = Sequence[Batch]  # one query's candidates, cut into batches

# Enough to see every channel: 256 pairs are 20,000 token rows a linear.
OBSERVED_PAIRS = 256
# Where every way breaks the ranking, which one breaks it least is chance: the scores' error tells.
TELLING_TAU = 0.5
# Enough to sort layer groups by what they do; a full-size model has 48.
EFFECT_PAIRS = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """A quantised graph and why it is as it is.

    Attributes:
        graph: with Q/DQ, everything else in the compute type.
        kept: layer groups that stay in the compute type, in the order of the search.
        agreement: with the float32 graph on the calibration pairs.
        facts: how it was found, for the manifest.
    """

    graph: Graph
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
    scales: str = STATIC,
) -> Choice:
    """Quantise `graph` so that the ranking of `queries` holds `limits`.

    First the way to choose scales (and, where channels stand out, to smooth them) that agrees
    best with float32; then, while a limit is broken, more layer groups kept in `compute_type`,
    those first that move the scores most when quantised alone.

    Args:
        scales: of activations: `static` or `dynamic`.

    Raises:
        EngineError: the limits do not hold even with only one layer group quantised.
    """
    scheme = scheme_of(scales)(graph, precision, compute_type, _spread(queries, OBSERVED_PAIRS))
    expected = score_queries(scorer(graph), queries)
    search = _Search(scheme, queries, expected, precision, compute_type, limits)
    best = search.best_method(progress)
    if search.holds(best):
        return search.choice(best)
    return search.choice(search.fewest_kept(best, progress))


@dataclass(frozen=True, slots=True)
class _Try:
    """One way to quantise and what came of it."""

    form: str
    method: str
    kept: tuple[str, ...]
    agreement: Agreement

    def to_json(self) -> dict[str, Any]:
        names = ("kendall_tau", "top_1", "mean_abs_diff", "max_abs_diff")
        figures = {name: round(getattr(self.agreement, name), 6) for name in names}
        kept = {"kept": len(self.kept)} if self.kept else {}
        way = f"{self.method}, smoothed" if self.form == SMOOTHED else self.method
        return {"method": way, **kept, **figures}


class _Search:
    def __init__(
        self,
        scheme: Scheme,
        queries: Sequence[Query],
        expected: Sequence[Float32],
        precision: str,
        compute_type: str,
        limits: FidelityLimits,
    ):
        self.scheme, self.queries, self.expected, self.limits = scheme, queries, expected, limits
        self.precision, self.compute_type = precision, compute_type
        self.effects: dict[str, float] = {}
        self.tried: list[_Try] = []

    def best_method(self, progress: Progress) -> _Try:
        """Try every form and method with everything quantised."""
        for form in self.scheme.forms:
            for method in self.scheme.methods:
                progress(f"calibrating {self.precision}: {method}, {form}")
                self.attempt(form, method, ())
        best = max(self.tried, key=lambda t: (t.agreement.kendall_tau, -t.agreement.mean_abs_diff))
        if best.agreement.kendall_tau >= TELLING_TAU:
            return best
        return min(self.tried, key=lambda t: t.agreement.mean_abs_diff)

    def fewest_kept(self, best: _Try, progress: Progress) -> _Try:
        """Keep more and more layer groups until the limits hold; then as few as they allow."""
        switches = self.scheme.switches(best.form, best.method)
        progress("measuring what each layer group does to the scores")
        self.effects = self.measured_effects(switches)
        order = sorted(self.effects, key=lambda group: -self.effects[group])
        most = len(order) - 1
        low, high = 0, 1
        while not self.holds(self.keeping(best, switches, order[:high], progress)) and high < most:
            low, high = high, min(2 * high, most)
        while high - low > 1:
            middle = (low + high) // 2
            holds = self.holds(self.keeping(best, switches, order[:middle], progress))
            low, high = (low, middle) if holds else (middle, high)
        while True:  # the switches leave the compute type out: the graph itself has the last word
            attempt = self.attempt(best.form, best.method, tuple(order[:high]))
            if self.holds(attempt):
                return attempt
            if high == most:
                break
            high += 1
        raise EngineError(
            f"{self.precision} does not hold the fidelity limits, even with all layer groups "
            f"but one kept in {self.compute_type}",
            faults=self.limits.broken_by(attempt.agreement),
            hint="build with --precision fp16, bf16 or fp32, or set the limits lower",
        )

    def keeping(
        self, best: _Try, switches: Switches, kept: Sequence[str], progress: Progress
    ) -> _Try:
        """Score with all but `kept` quantised; note what came of it."""
        progress(
            f"keeping {len(kept)} of {len(switches.groups)} layer groups in {self.compute_type}"
        )
        quantized = [group for group in switches.groups if group not in kept]
        scores = score_queries(lambda batch: switches.score(batch, quantized), self.queries)
        result = replace(best, kept=tuple(kept), agreement=rank_agreement(self.expected, scores))
        self.tried.append(result)
        return result

    def measured_effects(self, switches: Switches) -> dict[str, float]:
        """Return the mean |score difference| that quantising each layer group alone makes."""
        batches = _spread(self.queries, EFFECT_PAIRS)

        def scores(*quantized: str) -> Float32:
            return np.concatenate([switches.score(batch, quantized) for batch in batches])

        exact = scores()
        return {group: float(np.abs(scores(group) - exact).mean()) for group in switches.groups}

    def attempt(self, form: str, method: str, kept: tuple[str, ...]) -> _Try:
        """Quantise and score; note what came of it."""
        scores = score_queries(scorer(self.quantized(form, method, kept)), self.queries)
        result = _Try(form, method, kept, rank_agreement(self.expected, scores))
        self.tried.append(result)
        return result

    def quantized(self, form: str, method: str, kept: Sequence[str]) -> Graph:
        typed = self.scheme.quantized(form, method, kept)
        return typed if self.compute_type == "float32" else lower(typed, self.compute_type)

    def holds(self, attempt: _Try) -> bool:
        return not self.limits.broken_by(attempt.agreement)

    def choice(self, chosen: _Try) -> Choice:
        effects = {group: {"mean_abs_diff": self.effects[group]} for group in chosen.kept}
        facts = {
            "method": chosen.method,
            "smoothed": self.scheme.outliers(chosen.kept) if chosen.form == SMOOTHED else {},
            "kept": effects,
            "tried": [attempt.to_json() for attempt in self.tried],
        }
        graph = self.quantized(chosen.form, chosen.method, chosen.kept)
        return Choice(graph, chosen.kept, chosen.agreement, facts)


def score_queries(score: Callable[[Batch], Float32], queries: Sequence[Query]) -> list[Float32]:
    """Return the scores of every query's candidates: float32 [C] each."""
    return [np.concatenate([score(batch) for batch in query]) for query in queries]


def _spread(queries: Sequence[Query], num_pairs: int) -> list[Batch]:
    """Return about `num_pairs` pairs, the same share of every query."""
    batches = [batch for query in queries for batch in query]
    share = min(1.0, num_pairs / sum(map(len, batches)))
    return [batch.part(slice(0, max(1, round(share * len(batch))))) for batch in batches]
