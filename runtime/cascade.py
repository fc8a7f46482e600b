"""Two precisions, one ranking: a fast engine scores everything, a precise one what can still win.

Let `margin` bound how far a fast score lies below the precise one. The k-th best precise score
seen so far can only rise, so an image whose fast score plus `margin` lies below it can never
reach the top k. All others are scored again, highest fast score first. A fast score that is too
high does no harm: its image is scored again and sinks.

Source: the threshold algorithm (Fagin, Lotem, Naor, J. Comput. Syst. Sci. 66, 2003).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import numpy.typing as npt

from ..arguments import Arguments
from ..arrays import Bool, Float32, Int64
from ..engines.manifest import EngineManifest
from ..errors import EngineError, StoppedError
from .pipeline import Pipeline, Request, Scored
from .results import MARGIN, EngineLabel, Rescoring

Float64 = npt.NDArray[np.float64]

# Small rounds follow the rising threshold closely; smaller ones leave the engine half idle (CPU
# time a pair, demo scorer, OpenVINO float32 on two cores: 3.2 ms at 4 pairs, 2.5 at 16 and 32).
PAIRS_PER_ROUND = 16
# The largest difference of a build's few thousand pairs is not the largest there is.
SAFETY = 1.5


@dataclass(frozen=True, slots=True)
class Selection:
    """What `rescore_top` found, in the order of its candidates.

    Attributes:
        scores: float32 [N]: precise scores, NaN where there is none.
        rescored: bool [N]: which candidates the precise engine scored. No other one can be among
            the top k.
        margin: as given, or as widened.
        num_widened: how often a precise score contradicted the margin.
    """

    scores: Float32
    rescored: Bool
    margin: float
    num_widened: int


def rescore_top(
    fast: Float32,
    score_precisely: Callable[[Int64], Float32],
    *,
    top_k: int,
    margin: float,
    pairs_per_round: int = PAIRS_PER_ROUND,
) -> Selection:
    """Score precisely what can be among the `top_k` best, in rounds of `pairs_per_round`.

    Exact when no precise score exceeds its fast one by more than `margin`: the top k of `scores`
    are then those of the precise engine alone, ties included. Where no two scores differ by more
    than `margin` either way, fewer than `pairs_per_round` candidates were scored needlessly.
    What contradicts `margin` widens it for the rest.

    Args:
        fast: float32 [N]; a score that is not finite says nothing, so it is always rescored.
        score_precisely: int64 [M] positions in `fast` -> float32 [M]; what is not finite never
            counts as one of the best.
        top_k: how many of the best must be right, 1 or more.
    """
    finite = np.isfinite(fast)
    expected = np.where(finite, fast, np.nan).astype(np.float64)
    order = np.argsort(-np.where(finite, fast, np.inf), kind="stable")
    precise = np.full(len(fast), np.nan, np.float32)
    num_done = num_widened = 0
    while True:
        num_known, threshold = _kth_best(precise, top_k)
        most = max(pairs_per_round, top_k - num_known)
        positions = order[num_done : num_done + most]
        positions = positions[~(expected[positions] + margin < threshold)]  # NaN is never below
        if not len(positions):
            break
        precise[positions] = score_precisely(positions)
        num_done += len(positions)
        wider = _widened(margin, precise - expected)
        num_widened += wider > margin
        margin = wider
    rescored = np.zeros(len(fast), np.bool_)
    rescored[order[:num_done]] = True
    return Selection(precise, rescored, margin, num_widened)


def _kth_best(scores: Float32, k: int) -> tuple[int, float]:
    """Return how many scores are finite, and the k-th best; -inf where there are fewer."""
    finite = scores[np.isfinite(scores)]
    if len(finite) < k:
        return len(finite), -math.inf
    return len(finite), float(np.partition(finite, len(finite) - k)[-k])


def _widened(margin: float, differences: Float64) -> float:
    """Return `margin`, or more where the differences (precise - fast) contradict it.

    The images with the best fast scores are those it overrates, so their differences lean to one
    side: a spread beyond what `margin` allows tells of underrated images that nobody has seen
    yet. A constant offset has no spread; it costs its own size and no more.
    """
    finite = differences[np.isfinite(differences)]
    if not len(finite):
        return margin
    middle, largest = float(np.median(finite)), float(finite.max())
    if float(np.abs(finite - middle).max()) > 2 * margin:
        return max(margin, SAFETY * float(np.abs(finite).max()))
    if largest > margin:
        return largest + (SAFETY - 1) * (largest - middle)
    return margin


class Cascade:
    """Runs requests through a fast and a precise pipeline, one after the other.

    Both score the same store; the precise one's label is reported with every result.
    """

    def __init__(self, fast: Pipeline, precise: Pipeline, label: EngineLabel, margin: float):
        self._fast = fast
        self._precise = precise
        self._label = label
        self._margin = margin

    def run(self, request: Request, top_k: int) -> tuple[Scored, Rescoring]:
        """Score one query's pairs so that the best `top_k` are the precise engine's.

        Returns:
            The precise scores, NaN for pairs that cannot be among the best (they are `skipped`),
            and how the precise engine was used.

        Raises:
            As `Pipeline.run`; what was stopped while it was rescored has the fast engine's scores
            as its `partial`.
        """
        fast = self._fast.run(request)
        # What it found damaged has no score, so the precise pipeline sees it again.
        result = replace(fast, damaged={})
        began = perf_counter()

        def score_precisely(positions: Int64) -> Float32:
            queries = request.query_of_pair[positions]
            some = replace(request, query_of_pair=queries, rows=request.rows[positions])
            part = self._precise.run(some)
            result.damaged.update({int(positions[at]): why for at, why in part.damaged.items()})
            result.add_times(part)
            return part.scores

        try:
            selection = rescore_top(fast.scores, score_precisely, top_k=top_k, margin=self._margin)
        except StoppedError as stop:
            stop.partial = fast
            raise
        result.scores, result.skipped = selection.scores, ~selection.rescored
        num_rescored = int(np.count_nonzero(selection.rescored))
        total_ms = (perf_counter() - began) * 1e3
        return result, Rescoring(
            self._label, num_rescored, selection.margin, selection.num_widened, total_ms
        )


def margin_of(fast: EngineManifest, precise: EngineManifest, given: float | None) -> float:
    """Return the caller's margin for two engines, or the one that their fidelities give.

    Raises:
        RequestError: `given` is negative or not finite.
        EngineError: the engines are of two models or read other tokens (both engines' values
            named), or no margin can be learned.
    """
    pairs = [
        (name, getattr(fast.bundle, name), getattr(precise.bundle, name))
        for name in ("fingerprint_encoder", "fingerprint_scorer", "text")
    ]
    pairs.append(("token_dtype", fast.token_dtype, precise.token_dtype))
    faults = [
        f"{name}: {_words(fast)} has {first}, {_words(precise)} has {second}"
        for name, first, second in pairs
        if first != second
    ]
    if faults:
        raise EngineError(
            "these two engines cannot rerank together",
            faults=faults,
            hint="build both from one bundle: edje build BUNDLE --precision P --out ENGINE",
        )
    if given is None:
        return learned_margin(fast, precise)
    arguments = Arguments("a cascade")
    margin = arguments.number("rescore_margin", given, MARGIN)
    arguments.check()
    return margin


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


def _figure(manifest: EngineManifest, name: str, *, random_counts: bool = False) -> float:
    """Return a figure of an engine's fidelity if it was measured on real pairs."""
    fidelity = manifest.fidelity
    figure = fidelity.get(name)
    real = random_counts or not fidelity.get("random", True)
    if real and isinstance(figure, int | float) and math.isfinite(figure):
        return float(figure)
    measured = f"on {fidelity['data']}" if "data" in fidelity else "not at all"
    raise EngineError(
        f"no margin can be learned from {_words(manifest)}: its fidelity was measured {measured}, "
        "expected real queries over a store",
        hint="measure it (edje verify ENGINE --bundle B --store S --queries F --write), or give "
        "rescore_margin",
    )


def _words(manifest: EngineManifest) -> str:
    return f"the {manifest.backend} {manifest.precision} engine"
