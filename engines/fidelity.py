"""How faithful scores are to the float32 bundle: how far they lie apart, and who is ranked first.

`rank_agreement` compares lists of scores, `measure` goes through samples with any scorer, and
`measure_fidelity` does so with an open engine. The reference is the bundle's own graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..bundle import JOINT_ENCODER, BundleManifest
from ..errors import EngineError
from .contract import INPUTS, Batch, Engine, Float32, Progress
from .manifest import Profile
from .samples import RandomSamples, Samples, int8_batch, sample_batches

Scores = npt.NDArray[np.floating[Any]]
Scorer = Callable[[Batch], Float32]

RECALL_AT = (1, 5, 10)
REFERENCE = "bundle in float32, ONNX Runtime without optimisations"
NOT_MEASURED = "not measured on a device"


@dataclass(frozen=True, slots=True)
class Agreement:
    """How two scorers of the same queries agree; all differences are of raw logits.

    Attributes:
        num_queries, num_pairs: what was scored; every query ranks its own candidates.
        max_abs_diff, mean_abs_diff: over all pairs.
        p99_abs_diff, p999_abs_diff: 99 % (99.9 %) of the pairs differ by no more.
        max_underrating: how far a score lies below the reference's at most, below 0 if none
            does; a cascade's margin comes from it.
        kendall_tau: tau-b between the two rankings, mean over the queries.
        top_1, top_10: share of the reference's best 1 (10) found among the other's best 1 (10).
    """

    num_queries: int
    num_pairs: int
    max_abs_diff: float
    mean_abs_diff: float
    p99_abs_diff: float
    p999_abs_diff: float
    max_underrating: float
    kendall_tau: float
    top_1: float
    top_10: float


def rank_agreement(expected: Sequence[Scores], found: Sequence[Scores]) -> Agreement:
    """Compare two lists of scores, one float [C] a query; C may differ between queries.

    A score that is not finite ranks last and differs by infinity.

    Raises:
        ValueError: no pairs, or lists of different lengths.
    """
    pairs = [_comparable(a, b) for a, b in zip(expected, found, strict=True)]
    below = np.concatenate([a - b for a, b in pairs])
    diff = np.abs(below)
    high = np.quantile(diff, [0.99, 0.999], method="higher")
    return Agreement(
        num_queries=len(pairs),
        num_pairs=len(diff),
        max_abs_diff=float(diff.max()),
        mean_abs_diff=float(diff.mean()),
        p99_abs_diff=float(high[0]),
        p999_abs_diff=float(high[1]),
        max_underrating=float(below.max()),
        kendall_tau=float(np.mean([kendall_tau(a, b) for a, b in pairs])),
        top_1=float(np.mean([top_agreement(a, b, 1) for a, b in pairs])),
        top_10=float(np.mean([top_agreement(a, b, 10) for a, b in pairs])),
    )


def _comparable(expected: Scores, found: Scores) -> tuple[Scores, Scores]:
    """Return both as float64 [C], the found ones with -inf where they are not finite."""
    if expected.shape != found.shape:
        raise ValueError(f"scores of one query are {expected.shape} and {found.shape}")
    wide = found.astype(np.float64)
    return expected.astype(np.float64), np.where(np.isfinite(wide), wide, -np.inf)


def kendall_tau(first: Scores, second: Scores) -> float:
    """Return Kendall's tau-b of two score lists [N]; 1.0 where neither orders anything.

    Takes O(n log n): a token store ranks thousands. Source: Knight, JASA 61 (1966), pp. 436-439.
    """
    num_pairs = len(first) * (len(first) - 1) // 2
    a = np.unique(first, return_inverse=True)[1].reshape(-1).astype(np.int64)
    b = np.unique(second, return_inverse=True)[1].reshape(-1).astype(np.int64)
    ordered_a, ordered_b = num_pairs - _num_ties(a), num_pairs - _num_ties(b)
    if ordered_a == 0 or ordered_b == 0:
        return float(ordered_a == ordered_b)
    ties_of_both = _num_ties(a * len(b) + b)
    discordant = _num_inversions(b[np.lexsort((b, a))])
    net = ordered_a + ordered_b - num_pairs + ties_of_both - 2 * discordant
    return float(net / np.sqrt(float(ordered_a) * float(ordered_b)))


def _num_ties(ranks: npt.NDArray[np.int64]) -> int:
    """Count the pairs of equal ranks."""
    counts = np.unique(ranks, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


def _num_inversions(ranks: npt.NDArray[np.int64]) -> int:
    """Count the pairs i < j with ranks[i] > ranks[j]: a radix sort from the highest bit down.

    Two ranks part at the highest bit in which they differ; there, the earlier one has a 1.
    """
    total = 0
    for bit in reversed(range(int(ranks.max()).bit_length())):
        ones = (ranks >> bit) & 1
        ones_before = np.cumsum(ones) - ones
        group = ranks >> (bit + 1)
        begin = np.searchsorted(group, group)
        total += int(((ones_before - ones_before[begin]) * (1 - ones)).sum())
        ranks = ranks[np.argsort(ranks >> bit, kind="stable")]
    return total


def top_agreement(expected: Scores, found: Scores, k: int) -> float:
    """Return the share of the `k` best of `expected` that are among the `k` best of `found`."""
    k = min(k, len(expected))
    best = [set(np.argsort(-s, kind="stable")[:k].tolist()) for s in (expected, found)]
    return len(best[0] & best[1]) / k


def recall(scores: Sequence[Scores], targets: Sequence[int | None]) -> dict[str, float] | None:
    """Return {"R@1": share, ...}: queries whose target is among the first 1, 5, 10 of a ranking.

    Ties keep the order of the candidates. None where no query knows its target.
    """
    ranks = [
        int((s > s[target]).sum() + (s[:target] == s[target]).sum())
        for s, target in zip(scores, targets, strict=True)
        if target is not None
    ]
    if not ranks:
        return None
    return {f"R@{k}": sum(rank < k for rank in ranks) / len(ranks) for k in RECALL_AT}


@dataclass(frozen=True, slots=True)
class Fidelity(Agreement):
    """An agreement with what it was measured on: the `fidelity` of `engine.json`.

    Attributes:
        data: what was scored. `random` data shows rounding, not the quality of a ranking.
        reference: what it was compared with.
        measured_on: what computed the scores: backend, precision and device, or that the graph
            was emulated.
        recall, reference_recall: shares R@1, R@5, R@10 of the queries that know their target,
            `num_targets` of them; None where none does.
    """

    data: str
    random: bool
    reference: str
    measured_on: str
    num_targets: int
    recall: Mapping[str, float] | None
    reference_recall: Mapping[str, float] | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Fidelity | None:
        """Rebuild a fidelity from a manifest's entry; None where nothing was measured.

        Raises:
            EngineError: fields are missing (all named).
        """
        if not is_measured(values):
            return None
        names = [field.name for field in fields(cls)]
        missing = [f"fidelity.{name}: missing" for name in names if name not in values]
        if missing:
            raise EngineError(
                "this fidelity cannot be read",
                faults=missing,
                hint="measure it again: edje verify ENGINE --bundle BUNDLE --write",
            )
        return cls(**{name: values[name] for name in names})


def not_measured(emulated: Fidelity | None = None) -> dict[str, Any]:
    """Return the manifest's `fidelity` of an engine that the build machine cannot run.

    Args:
        emulated: the fidelity of the engine's graph, run elsewhere than on its device.
    """
    entry: dict[str, Any] = {"measured_on": NOT_MEASURED}
    return entry if emulated is None else {**entry, "emulated": emulated.to_json()}


def is_measured(values: Mapping[str, Any]) -> bool:
    """Return whether a manifest's `fidelity` holds figures of the engine itself."""
    return bool(values.get("measured_on", NOT_MEASURED) != NOT_MEASURED)


@dataclass(frozen=True, slots=True)
class FidelityLimits:
    """What an engine must hold; None asks for nothing.

    Attributes:
        min_kendall_tau: least mean tau-b, -1 to 1.
        max_top1_change: largest share of queries whose first place changes, 0 to 1.
    """

    min_kendall_tau: float | None = None
    max_top1_change: float | None = None

    def __post_init__(self) -> None:
        tau, change = self.min_kendall_tau, self.max_top1_change
        faults = []
        if tau is not None and not -1 <= tau <= 1:
            faults.append(f"min_kendall_tau: got {tau}, expected -1 to 1")
        if change is not None and not 0 <= change <= 1:
            faults.append(f"max_top1_change: got {change}, expected a share, 0 to 1")
        if faults:
            raise EngineError("no fidelity can have these limits", faults=faults)

    def broken_by(self, agreement: Agreement) -> list[str]:
        """Return one sentence for every limit that `agreement` breaks."""
        faults = []
        tau, change = self.min_kendall_tau, self.max_top1_change
        if tau is not None and not agreement.kendall_tau >= tau:
            faults.append(f"Kendall tau is {agreement.kendall_tau:.4f}, the limit is {tau:g}")
        found = 1 - agreement.top_1
        if change is not None and not found <= change + 1e-12:  # 1 - 0.99 is a little over 0.01
            faults.append(f"the first place changes in {found:.2%}, the limit is {change:.2%}")
        return faults


class InlineStream:
    """Runs submitted work at once on the calling thread."""

    handle = 0

    def submit(self, work: Callable[[], None]) -> None:
        work()


def measure_fidelity(
    engine: Engine, bundle: Path, samples: Samples | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Score `samples` (None: seeded random pairs) with `engine` and with the bundle in float32.

    Returns:
        The fields of `Fidelity` as plain JSON values.

    Raises:
        EngineError: onnxruntime is missing, either run fails, or a score is not finite.
    """
    manifest = engine.manifest
    samples = RandomSamples(manifest.bundle) if samples is None else samples
    label = f"{manifest.backend} {manifest.backend_version} {manifest.precision}"
    fidelity = measure(
        engine_scorer(engine),
        bundle,
        samples,
        manifest.profile,
        measured_on=f"{label} on {device_words(manifest.device)}",
        token_dtype=manifest.token_dtype,
        progress=progress,
    )
    return fidelity.to_json()


def measure(
    score: Scorer,
    bundle: Path,
    samples: Samples,
    profile: Profile,
    *,
    measured_on: str,
    token_dtype: str = "float16",
    progress: Progress | None = None,
) -> Fidelity:
    """Compare any scorer with the bundle's float32 graph, sample by sample.

    Args:
        score: gets host batches that fit `profile`, of one query each; returns float32 [P].
        measured_on: what computes `score`, in words.
        token_dtype: `int8` hands `score` int8 tokens with scales; the reference always reads
            the float16 ones.
        progress: called with one short line now and then.

    Raises:
        EngineError: no samples, onnxruntime is missing, a run fails, or a score is not finite.
    """
    text = BundleManifest.read(bundle).text
    reference = reference_scorer(bundle)
    expected: list[Float32] = []
    found: list[Float32] = []
    targets: list[int | None] = []
    for number, sample in enumerate(samples):
        if progress is not None and number % 16 == 0:
            progress(f"measuring fidelity: query {number + 1} of {len(samples)}")
        batches = list(sample_batches(sample, profile, pad_id=text.pad_id, sep_id=text.sep_id))
        expected.append(np.concatenate([reference(batch) for batch in batches]))
        asked = map(int8_batch, batches) if token_dtype == "int8" else batches
        found.append(np.concatenate([score(batch) for batch in asked]))
        targets.append(sample.target)
    if not expected:
        raise EngineError(f"there is nothing to measure fidelity on: {samples.data}")
    _check_finite(expected, "the bundle's float32 graph", "these visual tokens overflow it")
    _check_finite(found, measured_on, "build with --precision fp32")
    return Fidelity(
        **asdict(rank_agreement(expected, found)),
        data=samples.data,
        random=samples.random,
        reference=REFERENCE,
        measured_on=measured_on,
        num_targets=sum(target is not None for target in targets),
        recall=recall(found, targets),
        reference_recall=recall(expected, targets),
    )


def engine_scorer(engine: Engine) -> Scorer:
    """Return what scores host batches with an open engine, on the CPU or on a device."""
    if engine.manifest.device.get("kind") == "cuda":
        cuda_memory = import_module(".cuda_memory", __package__)  # its libraries wait for a device
        return lambda batch: cast(Float32, cuda_memory.score_host_batch(engine, batch))
    stream = InlineStream()

    def score(batch: Batch) -> Float32:
        scores = np.empty(len(batch), np.float32)
        engine.enqueue(batch, scores, stream=stream)
        return scores

    return score


def device_words(device: Mapping[str, Any]) -> str:
    """Return a manifest's `device` entry in a few words."""
    names = ("model", "name", "architecture", "kind")
    return next((str(device[name]) for name in names if device.get(name)), "an unnamed device")


def _check_finite(scores: Sequence[Float32], where: str, hint: str) -> None:
    faulty = sum(np.count_nonzero(~np.isfinite(part)) for part in scores)
    if faulty:
        raise EngineError(
            f"{faulty} of {sum(map(len, scores))} scores of {where} are not finite", hint=hint
        )


def reference_scorer(bundle: Path) -> Scorer:
    """Open the bundle's float32 graph in ONNX Runtime; return the function that scores a batch.

    Optimisations would save nothing and move the scores by 6e-6: the demo's model took 1.04 s
    without and 1.08 s with all of them, the full-size one 3.9 s and 3.6 s (1.32.0, two cores).

    Raises:
        EngineError: onnxruntime is missing, or cannot load the graph.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EngineError(
            f"fidelity is measured against ONNX Runtime, which is missing: {error}",
            hint="pip install 'edje-runtime[cpu]'",
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = bundle / JOINT_ENCODER
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT's exception classes share no base of their own
        raise EngineError(f"ONNX Runtime cannot load {path}: {error}") from error

    def score(batch: Batch) -> Float32:
        scores: Float32 = session.run(None, {name: getattr(batch, name) for name in INPUTS})[0]
        return scores

    return score
