"""Several engines, one ranking: the first scores everything, each next one what can still win.

An int8 engine before a float32 one, a shallow one before the whole model, or three in a row; what
is scored again is chosen by `survivors.search`, and the last engine's scores are the result.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from ..arguments import Arguments
from ..arrays import Float32, Int64
from ..engines.agreement import LOOKS_AGAIN, SAFETY
from ..engines.manifest import EngineManifest
from ..errors import EngineError, StoppedError
from .hidden import NOWHERE, Hidden, HiddenPool
from .pipeline import Pipeline, Request, Scored
from .results import MARGIN, RECALL, EngineLabel, Rescoring
from .survivors import LEAST, Rule, Selection, search

_MEASURE = "measure it: edje verify ENGINE --bundle B --store S --queries F --write"


@dataclass(frozen=True, slots=True)
class Hop:
    """How survivors of one engine are chosen for the next.

    Attributes:
        margin: raw logits; None: by depth, or by what held `recall`.
        recall: share of the top k that may not be lost, on queries like those of the calibration.
        shares: how many are wanted -> share of the candidates, by fast score, that holds them;
            ascending, only with `recall`.
        levels: of the margin, as in `survivors.Rule`.
    """

    margin: float | None = None
    recall: float | None = None
    shares: Sequence[tuple[int, float]] = ()
    levels: Sequence[tuple[float, float]] = ()

    def rule(self, top_k: int, num_candidates: int, slack: float) -> Rule:
        """Return the rule for one request."""
        if self.recall is None:
            return Rule(margin=self.margin, slack=slack, levels=self.levels)
        found = [share for best, share in self.shares if best >= top_k]
        return Rule(share=found[0] if found else max(top_k / num_candidates, self.shares[-1][1]))

    def words(self, rule: Rule, margin: float | None) -> str:
        """Say how survivors were chosen."""
        if margin is not None:
            return f"within {margin:.3g} of the k-th best score"
        if rule.share is not None:
            return f"the best {rule.share:.1%}, which held a recall of {self.recall:g}"
        return f"{LOOKS_AGAIN} times as deep as the deepest of the best, and {LEAST} more at least"


class Step(NamedTuple):
    """What a cascade wants scored next.

    Attributes:
        stage: by which engine, 0 being the first.
        pairs: int64 [M]: positions among the request's pairs.
    """

    stage: int
    pairs: Int64


# Is sent the `Scored` of each step's pairs, in their order; returns what `Cascade.run` does.
Steps = Generator[Step, Scored, tuple[Scored, Rescoring]]


class Cascade:
    """Runs requests through two pipelines or more, one after the other; all read one store."""

    def __init__(
        self,
        pipelines: Sequence[Pipeline],
        labels: Sequence[EngineLabel],
        hops: Sequence[Hop],
        pool: HiddenPool | None = None,
    ):
        """Join pipelines, the fastest first, with a hop between each and the next.

        Args:
            pool: for hidden states of the first engine, where others can go on from them.
        """
        self._pipelines = pipelines
        self._labels, self._hops, self._pool = labels[1:], hops, pool

    def run(self, request: Request, top_k: int) -> tuple[Scored, Rescoring]:
        """Score one query's pairs so that the best `top_k` are the last engine's.

        Returns:
            The last engine's scores, NaN for pairs that it did not score (they are `skipped`), and
            how each engine but the first was used.

        Raises:
            As `Pipeline.run`; what was stopped while it was rescored has the first engine's scores
            as its `partial`.
        """
        steps = self.steps(len(request.rows), top_k)
        fast = part = None
        with self._room(request) as hidden:
            try:
                while True:
                    step = next(steps) if part is None else steps.send(part)
                    part = self._scored(request, step, hidden)
                    fast = fast or part
            except StopIteration as end:
                found: tuple[Scored, Rescoring] = end.value
                return found
            except StoppedError as stop:
                stop.partial = fast or stop.partial
                raise

    def steps(self, num_pairs: int, top_k: int) -> Steps:
        """Say step by step what to score, for who forms batches of many requests' steps."""
        fast = yield Step(0, np.arange(num_pairs))
        # What it found damaged has no score, so the next engine sees it again.
        result = replace(fast, damaged={})
        positions: Int64 = np.arange(num_pairs)
        scores, story = fast.scores, None
        for stage, (label, hop, slack) in enumerate(self._stages(), 1):
            began, num_resumed = perf_counter(), result.num_resumed
            rule = hop.rule(top_k, num_pairs, slack)
            chosen = yield from _search_by(stage, positions, scores, top_k, rule, result)
            again = np.flatnonzero(chosen.rescored)
            positions, scores = positions[again], chosen.scores[again]
            story = Rescoring(
                engine=label,
                num_rescored=len(again),
                margin=chosen.margin,
                num_widened=chosen.num_widened,
                total_ms=(perf_counter() - began) * 1e3,
                chosen=hop.words(rule, chosen.margin),
                before=story,
                num_resumed=result.num_resumed - num_resumed,
            )
        assert story is not None
        result.scores = np.full(num_pairs, np.nan, np.float32)
        result.scores[positions] = scores
        result.skipped = np.ones(num_pairs, np.bool_)
        result.skipped[positions] = False
        return result, story

    def _stages(self) -> Iterator[tuple[EngineLabel, Hop, float]]:
        """Yield each stage behind the first, with what its scores may hide from the next one.

        Scores off by a margin m either way can put an image of the precise top k 2 m below the
        k-th best of theirs.
        """
        later = [hop.margin or 0.0 for hop in self._hops[1:]] + [0.0]
        for label, hop, margin in zip(self._labels, self._hops, later, strict=True):
            yield label, hop, 2 * margin

    def _room(self, request: Request) -> AbstractContextManager[Hidden | None]:
        """Return where this request's hidden states stay, if anywhere."""
        if self._pool is None:
            return nullcontext()
        return self._pool.lend(int(request.queries.text_length[0]), len(request.rows))

    def _scored(self, request: Request, step: Step, hidden: Hidden | None) -> Scored:
        """Score a step's pairs; those whose hidden states were kept go on from there."""
        pipeline = self._pipelines[step.stage]
        if step.stage == 0:
            scored = pipeline.run(replace(request, hidden=hidden))
            if hidden is not None:
                hidden.forget_unscored()
            return scored
        resumes = hidden is not None and self._pool and step.stage in self._pool.resuming
        if hidden is None or not resumes:
            return pipeline.run(_part(request, step.pairs))
        is_kept = hidden.place[step.pairs] != NOWHERE
        result = Scored(np.empty(len(step.pairs), np.float32), {})
        for some, kept in ((is_kept, hidden), (~is_kept, None)):
            if some.any():
                pairs = step.pairs[some]
                part = _part(request, pairs, None if kept is None else kept.of(pairs))
                result.take_in(np.flatnonzero(some), pipeline.run(part))
        result.num_resumed = int(is_kept.sum())
        return result


def _part(request: Request, pairs: Int64, hidden: Hidden | None = None) -> Request:
    """Return some of a request's pairs as one."""
    queries, rows = request.query_of_pair[pairs], request.rows[pairs]
    return replace(request, query_of_pair=queries, rows=rows, hidden=hidden)


def _search_by(
    stage: int, positions: Int64, scores: Float32, top_k: int, rule: Rule, result: Scored
) -> Generator[Step, Scored, Selection]:
    """Ask for the survivors among the pairs at `positions`; `result` learns what came of it."""
    asks = search(scores, top_k=top_k, rule=rule)
    try:
        chosen = next(asks)
        while True:
            pairs = positions[chosen]
            part = yield Step(stage, pairs)
            result.damaged.update({int(pairs[one]): why for one, why in part.damaged.items()})
            result.add_work(part)
            chosen = asks.send(part.scores)
    except StopIteration as end:
        selection: Selection = end.value
        return selection


def hops_of(
    manifests: Sequence[EngineManifest], margin: float | None, recall: float | None
) -> list[Hop]:
    """Return the hops between engines, the fastest first.

    Args:
        margin: the caller's, between the first two; None: as measured.
        recall: keep fixed shares of the candidates that held this recall; None: make sure.

    Raises:
        RequestError: a margin that is negative or not finite, a recall that is no share, or both.
        EngineError: the engines are of two models or read other tokens (all values named), one is
            shallow that must be whole, or nothing can be learned from what was measured.
    """
    given = Arguments("a cascade")
    if margin is not None:
        margin = given.number("rescore_margin", margin, MARGIN)
    if recall is not None and not _is_share(recall):
        given.refuse("recall", recall, RECALL)
    if margin is not None and recall is not None:
        given.faults.append("rescore_margin and recall: both choose survivors, give one")
    given.check()
    _check_together(manifests)
    return [
        _hop(fast, precise, margin if number == 0 else None, recall)
        for number, (fast, precise) in enumerate(pairwise(manifests))
    ]


def _hop(
    fast: EngineManifest, precise: EngineManifest, margin: float | None, recall: float | None
) -> Hop:
    if recall is not None:
        return Hop(recall=recall, shares=_shares(fast, recall))
    if margin is None and fast.is_shallow:
        return Hop()
    if margin is not None:
        return Hop(margin=margin)
    return Hop(margin=learned_margin(fast, precise), levels=_learned_levels(fast, precise))


def _check_together(manifests: Sequence[EngineManifest]) -> None:
    """Raise EngineError unless all are of one model and read the same tokens."""
    first, faults = manifests[0], []
    for other in manifests[1:]:
        pairs = [
            (name, getattr(first.bundle, name), getattr(other.bundle, name))
            for name in ("fingerprint_encoder", "fingerprint_scorer", "text")
        ]
        pairs.append(("token_dtype", first.token_dtype, other.token_dtype))
        faults += [
            f"{name}: {_words(first)} has {one}, {_words(other)} has {two}"
            for name, one, two in pairs
            if one != two
        ]
    if manifests[-1].is_shallow:
        faults.append(f"the last one scores what is returned, and {_words(manifests[-1])} cannot")
    if faults:
        raise EngineError(
            "these engines cannot rerank together",
            faults=faults,
            hint="build all from one bundle: edje build BUNDLE --precision P --out ENGINE",
        )


def learned_margin(fast: EngineManifest, precise: EngineManifest) -> float:
    """Return the margin that the fidelities in two manifests give.

    The largest shortfall of the fast engine against float32 and the largest difference of the
    precise one add up; the sum is taken `SAFETY` times.

    Raises:
        EngineError: no figures of real pairs (a float32 engine's may be of random ones).
    """
    shortfall = _figure(fast, "max_underrating")
    rounding = _figure(precise, "max_abs_diff", random_counts=precise.precision == "fp32")
    return SAFETY * (max(shortfall, 0.0) + rounding)


def _learned_levels(fast: EngineManifest, precise: EngineManifest) -> Sequence[tuple[float, float]]:
    """Return the share of the learned margin that low scores have; none from an older `fidelity`.

    Both engines' errors shrink there, but only the fast one's were measured level by level.
    """
    margin = learned_margin(fast, precise) / SAFETY
    if not margin:
        return ()
    fixed = _figure(precise, "max_abs_diff", random_counts=precise.precision == "fp32") / margin
    levels = _fidelity(fast).get("levels") or ()
    return [(up_to, fixed + (1 - fixed) * share) for up_to, share in levels]


def _figure(manifest: EngineManifest, name: str, *, random_counts: bool = False) -> float:
    """Return a figure of an engine's fidelity if it was measured on real pairs."""
    figure = _fidelity(manifest, random_counts=random_counts).get(name)
    if isinstance(figure, int | float) and math.isfinite(figure):
        return float(figure)
    raise _unmeasured(manifest, f"{name} is {figure!r}")


def _shares(manifest: EngineManifest, recall: float) -> list[tuple[int, float]]:
    """Return what share of the candidates held `recall` of how many of the best."""
    fidelity = _fidelity(manifest)
    depths = fidelity.get("depths") or {}
    try:
        shares = [
            (int(k), min(s for r, s in each.items() if float(r) >= recall - 1e-9))
            for k, each in depths.items()
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _unmeasured(manifest, f"depths are {depths!r}") from error
    if not shares:
        raise _unmeasured(manifest, "its queries have too few candidates")
    return sorted(shares)


def _fidelity(manifest: EngineManifest, *, random_counts: bool = False) -> Mapping[str, Any]:
    """Return the fidelity in a manifest if it was measured on real pairs."""
    fidelity = manifest.fidelity
    if random_counts or not fidelity.get("random", True):
        return fidelity
    measured = f"on {fidelity['data']}" if "data" in fidelity else "not at all"
    raise _unmeasured(manifest, f"its fidelity was measured {measured}")


def _unmeasured(manifest: EngineManifest, why: str) -> EngineError:
    return EngineError(
        f"no margin can be learned from {_words(manifest)}: {why}, expected real queries over a "
        "store",
        hint=f"{_MEASURE}, or give rescore_margin",
    )


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _words(manifest: EngineManifest) -> str:
    return f"the {manifest.words} engine"
