"""From a bundle's graph to a shallow one: fit heads, choose how many layers, cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ...arrays import Float32
from ...bundle import BundleManifest
from ...errors import EngineError
from ..agreement import LOOKS_AGAIN
from ..contract import Batch, Progress
from ..manifest import Profile
from ..precision.emulate import runner
from ..precision.graph import Graph
from ..samples import Samples, sample_batches
from .cut import ROWS, check_layers, cut, num_layers_of
from .fit import Fit, fit_head, observe

AUTO = "auto"
_TIMED_PAIRS, _ROUNDS = 16, 3
_TOP_SHARE = 10  # one of so many candidates is wanted: fewer would be the easiest alone


@dataclass(frozen=True, slots=True)
class Shallow:
    """A shallow graph that was written, and why it is as it is.

    Attributes:
        graph: float32 ONNX, `cut.cut` of the bundle's.
        layers: of the bundle's, the first.
        facts: the manifest's `precision_plan["shallow"]`.
    """

    graph: Path
    layers: int
    facts: Mapping[str, Any]


def make_shallow(
    source: Path,
    out: Path,
    layers: int | str,
    samples: Samples | None,
    bundle: BundleManifest,
    profile: Profile,
    progress: Progress = lambda _: None,
) -> Shallow:
    """Write the graph of the first `layers` layers of `source` to `out`.

    Args:
        layers: how many, or `auto`: those with which a cascade takes least time.
        samples: real pairs; the head is fitted on what the whole model says of them.

    Raises:
        EngineError: no real pairs, or a number of layers that this model cannot be cut after.
    """
    graph = Graph.read(source)
    most = num_layers_of(graph)
    if layers != AUTO:
        check_layers(int(layers), most)
    if samples is None or samples.random or not len(samples):
        raise EngineError(
            "a shallow engine needs real pairs to fit its head on, got "
            + ("none" if samples is None or not len(samples) else samples.data),
            hint="add --calibration-store STORE --calibration-queries FILE",
        )
    pad, sep = bundle.text.pad_id, bundle.text.sep_id
    queries = [list(sample_batches(s, profile, pad_id=pad, sep_id=sep)) for s in samples]
    depths = range(1, most) if layers == AUTO else [int(layers)]
    began = perf_counter()
    seen = observe(graph, queries, depths, progress)
    scored = perf_counter()
    fits = {depth: fit_head(seen.rows[depth], seen.scores) for depth in depths}
    solved = perf_counter()
    tried: Mapping[int, Mapping[str, float]] = {}
    chosen = depths[0]
    if layers == AUTO:
        progress("timing how many layers pay")
        tried = _costs(graph, fits, queries[0][0], seen.scores)
        chosen = min(tried, key=lambda depth: tried[depth]["time"])
    cut(graph, chosen, fits[chosen].head).write(out)
    facts = _facts(fits[chosen], chosen, most, samples)
    facts |= {
        "seconds": {"scoring": round(scored - began, 2), "fitting": round(solved - scored, 2)},
        "tried": {str(depth): cost for depth, cost in tried.items()},
    }
    return Shallow(out, chosen, facts)


def _costs(
    graph: Graph, fits: Mapping[int, Fit], batch: Batch, expected: Sequence[Float32]
) -> dict[int, Mapping[str, float]]:
    """Return what each depth costs a cascade, as shares of the whole model's time."""
    some = batch.part(slice(0, _TIMED_PAIRS))
    runs = {depth: runner(cut(graph, depth, fit.head)) for depth, fit in fits.items()}
    runs[0] = runner(graph)  # the whole model
    best = dict.fromkeys(runs, np.inf)
    for _ in range(1 + _ROUNDS):  # the first also warms up; in turns, so that noise hits all
        for depth, run in runs.items():
            began = perf_counter()
            run(some)
            best[depth] = min(best[depth], perf_counter() - began)
    costs: dict[int, Mapping[str, float]] = {}
    for depth, fit in fits.items():
        first = best[depth] / best[0]
        again = _share_rescored(fit.scores, expected)
        costs[depth] = {
            "first_stage": round(float(first), 4),
            "rescored": round(again, 4),
            "time": round(float(first) + again, 4),
        }
    return costs


def _share_rescored(scores: Sequence[Float32], expected: Sequence[Float32]) -> float:
    """Return the share of candidates that a cascade would score again, mean over the queries.

    Counted is who stands before the deepest of the best and is none of them: how many are wanted
    of how many, the calibration does not know.
    """
    shares = []
    for own, whole in zip(scores, expected, strict=True):
        top = np.argsort(-whole, kind="stable")[: max(1, len(whole) // _TOP_SHARE)]
        place = np.empty(len(own), np.int64)
        place[np.argsort(-own, kind="stable")] = np.arange(len(own))
        others_before = float(place[top].max() + 1 - len(top))
        shares.append(min(1.0, LOOKS_AGAIN * (others_before + 1) / len(own)))
    return float(np.mean(shares))


def _facts(fit: Fit, layers: int, most: int, samples: Samples) -> dict[str, Any]:
    """Describe a fit for the manifest."""
    return {
        "layers": layers,
        "of": most,
        "head": f"linear, of {', '.join(ROWS)} after layer {layers}",
        "fitted_on": samples.data,
        "fitted_on_sha256": samples.fingerprint,
        "penalty": fit.penalty,
        "left_out": {
            "what": "queries that a head was not fitted on, a fourth of them at a time",
            "correlation": round(fit.correlation, 4),
            "depths": fit.depths,
        },
    }
