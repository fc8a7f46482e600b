"""How far an engine's scores lie from the float32 bundle's, and whether the ranking is the same.

The reference is the bundle's own graph, run by ONNX Runtime with every optimisation off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import JOINT_ENCODER
from ..errors import EngineError
from .contract import INPUTS, Batch, Engine, Float32
from .samples import RandomSamples, sample_batches

Scores = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What a build measured.

    Attributes:
        data: what was scored. Random data shows rounding, not the quality of a ranking.
        reference: what it was compared with.
        num_queries, num_candidates: every query ranks every candidate.
        max_abs_diff, mean_abs_diff: of the raw logits.
        kendall_tau: tau-b between the two rankings, mean over the queries.
        top_1, top_10: share of the reference's best 1 (10) found among the engine's best 1 (10).
    """

    data: str
    reference: str
    num_queries: int
    num_candidates: int
    max_abs_diff: float
    mean_abs_diff: float
    kendall_tau: float
    top_1: float
    top_10: float


class InlineStream:
    """Runs submitted work at once on the calling thread."""

    handle = 0

    def submit(self, work: Callable[[], None]) -> None:
        work()


def measure_fidelity(engine: Engine, bundle: Path) -> dict[str, Any]:
    """Score seeded random pairs with `engine` and with the bundle's float32 graph.

    Returns:
        The fields of `Fidelity` as plain JSON values.

    Raises:
        EngineError: onnxruntime is missing, either run fails, or a score is not finite.
    """
    manifest = engine.manifest
    text, samples = manifest.bundle.text, RandomSamples(manifest.bundle)
    batches = [
        batch
        for sample in samples
        for batch in sample_batches(
            sample, manifest.profile, pad_id=text.pad_id, sep_id=text.sep_id
        )
    ]
    reference = _reference(bundle / JOINT_ENCODER)
    stream = InlineStream()
    expected, got = [], []
    for batch in batches:
        scores = np.empty(len(batch), np.float32)
        engine.enqueue(batch, scores, stream=stream)
        got.append(scores)
        expected.append(reference(batch))
    shape = (len(samples), -1)
    found = np.concatenate(got).reshape(shape)
    if not np.isfinite(found).all():
        raise EngineError(
            f"{np.count_nonzero(~np.isfinite(found))} of {found.size} scores of the new engine "
            "are not finite",
            hint="build with --precision fp32",
        )
    return asdict(compare_scores(np.concatenate(expected).reshape(shape), found, samples.data))


def compare_scores(expected: Scores, found: Scores, data: str = "") -> Fidelity:
    """Compare two score tables [queries, candidates], both float."""
    diff = np.abs(expected - found)
    pairs = list(zip(expected, found, strict=True))
    return Fidelity(
        data=data,
        reference="bundle in float32, ONNX Runtime without optimisations",
        num_queries=expected.shape[0],
        num_candidates=expected.shape[1],
        max_abs_diff=float(diff.max()),
        mean_abs_diff=float(diff.mean()),
        kendall_tau=float(np.mean([kendall_tau(a, b) for a, b in pairs])),
        top_1=float(np.mean([top_agreement(a, b, 1) for a, b in pairs])),
        top_10=float(np.mean([top_agreement(a, b, 10) for a, b in pairs])),
    )


def kendall_tau(first: Scores, second: Scores) -> float:
    """Return Kendall's tau-b of two score lists [N]; 1.0 where either is constant in both."""
    upper = np.triu_indices(len(first), 1)
    a = np.sign(first[:, None] - first[None, :])[upper]
    b = np.sign(second[:, None] - second[None, :])[upper]
    scale = float(np.sqrt(np.count_nonzero(a) * np.count_nonzero(b)))
    if scale == 0.0:
        return float(not a.any() and not b.any())
    return float((a * b).sum()) / scale


def top_agreement(expected: Scores, found: Scores, k: int) -> float:
    """Return the share of the `k` best of `expected` that are among the `k` best of `found`."""
    k = min(k, len(expected))
    best = [set(np.argsort(-s, kind="stable")[:k].tolist()) for s in (expected, found)]
    return len(best[0] & best[1]) / k


def _reference(joint_encoder: Path) -> Callable[[Batch], Float32]:
    """Open the bundle's graph in ONNX Runtime; return the function that scores a batch."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EngineError(
            f"building measures the engine against ONNX Runtime, which is missing: {error}",
            hint="pip install 'edje-runtime[cpu]'",
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(joint_encoder), options, providers=["CPUExecutionProvider"])

    def score(batch: Batch) -> Float32:
        scores: Float32 = session.run(None, {name: getattr(batch, name) for name in INPUTS})[0]
        return scores

    return score
