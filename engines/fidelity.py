"""How faithful an engine, or any scorer, is to the float32 bundle: the `fidelity` of `engine.json`.

The reference is the bundle's own graph in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..arrays import Float32
from ..bundle import INPUTS, JOINT_ENCODER, OUTPUT, BundleManifest
from ..errors import EngineError
from ..kernels.device.host import InlineStream
from .agreement import Agreement, depth_shares, error_levels, rank_agreement, recall
from .contract import Batch, Engine, Progress, raise_faults, value_faults
from .forwards import forwards, open_session
from .manifest import Profile
from .samples import RandomSamples, Samples, int8_batch, sample_batches

if TYPE_CHECKING:
    from ..kernels.device.measuring import GpuArrays

Scorer = Callable[[Batch], Float32]

REFERENCE = "bundle in float32, ONNX Runtime without optimisations"
NOT_MEASURED = "not measured on a device"


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
        depths: how deep to look into its ranking for the reference's best, as `depth_shares`.
        levels: how much less low scores err than high ones, as `error_levels`.
    """

    data: str
    random: bool
    reference: str
    measured_on: str
    num_targets: int
    recall: Mapping[str, float] | None
    reference_recall: Mapping[str, float] | None
    depths: Mapping[str, Mapping[str, float]]
    levels: list[list[float]]

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
        max_rescored: largest share of candidates that must be scored again to be sure of the best
            tenth (`Agreement.rescored`), 0 to 1: what matters of a cascade's first engine.
    """

    min_kendall_tau: float | None = None
    max_top1_change: float | None = None
    max_rescored: float | None = None

    def __post_init__(self) -> None:
        tau, change = self.min_kendall_tau, self.max_top1_change
        faults = []
        if tau is not None and not -1 <= tau <= 1:
            faults.append(f"min_kendall_tau: got {tau}, expected -1 to 1")
        if change is not None and not 0 <= change <= 1:
            faults.append(f"max_top1_change: got {change}, expected a share, 0 to 1")
        if self.max_rescored is not None and not 0 <= self.max_rescored <= 1:
            faults.append(f"max_rescored: got {self.max_rescored}, expected a share, 0 to 1")
        if faults:
            raise EngineError("no fidelity can have these limits", faults=faults)

    def broken_by(self, agreement: Agreement) -> list[str]:
        """Return one sentence for every limit that `agreement` breaks."""
        faults = []
        tau, change = self.min_kendall_tau, self.max_top1_change
        if tau is not None and not agreement.kendall_tau >= tau:
            faults.append(f"Kendall tau is {agreement.kendall_tau:.4f}, the limit is {tau:g}")
        changed = 1 - agreement.top_1
        if change is not None and not changed <= change + 1e-12:  # 1 - 0.99 is a little over 0.01
            faults.append(f"the first place changes in {changed:.2%}, the limit is {change:.2%}")
        again, most = agreement.rescored, self.max_rescored
        if most is not None and not again <= most:
            faults.append(f"a cascade would rescore {again:.1%}, the limit is {most:.1%}")
        return faults


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
        measured_on=f"{label} on {_device_words(manifest.device)}",
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
    measured: list[Float32] = []
    targets: list[int | None] = []
    for number, sample in enumerate(samples):
        if progress is not None and number % 16 == 0:
            progress(f"measuring fidelity: query {number + 1} of {len(samples)}")
        batches = list(sample_batches(sample, profile, pad_id=text.pad_id, sep_id=text.sep_id))
        expected.append(np.concatenate([reference(batch) for batch in batches]))
        asked = map(int8_batch, batches) if token_dtype == "int8" else batches
        measured.append(np.concatenate([score(batch) for batch in asked]))
        targets.append(sample.target)
    if not expected:
        raise EngineError(f"there is nothing to measure fidelity on: {samples.data}")
    _check_finite(expected, "the bundle's float32 graph", "these visual tokens overflow it")
    _check_finite(measured, measured_on, "build with --precision fp32")
    return Fidelity(
        **asdict(rank_agreement(expected, measured)),
        data=samples.data,
        random=samples.random,
        reference=REFERENCE,
        measured_on=measured_on,
        num_targets=sum(target is not None for target in targets),
        recall=recall(measured, targets),
        reference_recall=recall(expected, targets),
        depths=depth_shares(expected, measured),
        levels=error_levels(expected, measured),
    )


def engine_scorer(engine: Engine) -> Scorer:
    """Return what scores host batches with an open engine, on the CPU or on a device."""
    if engine.manifest.device.get("kind") == "cuda":
        return lambda batch: score_host_batch(engine, batch)
    stream = InlineStream()

    def score(batch: Batch) -> Float32:
        scores = np.empty(len(batch), np.float32)
        engine.enqueue(batch, scores, stream=stream)
        return scores

    return score


def _device_words(device: Mapping[str, Any]) -> str:
    """Name what runs here an engine of this `device` entry: it may be built for many GPUs."""
    if device.get("kind") == "cuda":
        from ..kernels.device.facts import current_gpu

        return current_gpu().name
    return str(device.get("model") or device.get("architecture") or "an unnamed CPU")


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
    path = bundle / JOINT_ENCODER
    try:
        session = open_session(str(path), ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    except Exception as error:  # ORT's exception classes share no base of their own
        raise EngineError(f"ONNX Runtime cannot load {path}: {error}") from error
    run = forwards(session, [OUTPUT])
    return lambda batch: run(batch)[0]


def score_host_batch(engine: Engine, batch: Batch) -> Float32:
    """Score a batch of host arrays with an engine on the GPU; allocates and waits each time.

    Args:
        engine: open, of device kind `cuda`.
        batch: host arrays that fit the engine's profile; its values are checked here.

    Returns:
        float32 [P] in host memory, the raw logits.

    Raises:
        EngineError: a batch that does not fit, or CUDA fails.
    """
    with batch_on_gpu(engine, batch) as (gpu, there, scores):
        engine.enqueue(there, scores, stream=gpu.stream)
        return gpu.download(cast(Any, scores))[0]


@contextmanager
def batch_on_gpu(engine: Engine, batch: Batch) -> Iterator[tuple[GpuArrays, Batch, Float32]]:
    """Yield the GPU's arrays, a copy of a host batch among them, and where its scores go.

    Raises:
        EngineError: values that the engine cannot take, or CUDA fails.
    """
    from ..kernels.device.measuring import gpu_arrays

    raise_faults(value_faults(batch, engine.manifest))
    host = {name: getattr(batch, name) for name in (*INPUTS, "visual_scales")}
    with gpu_arrays() as gpu:
        arrays: dict[str, Any] = {
            name: None if array is None else gpu.upload(np.ascontiguousarray(array))
            for name, array in host.items()
        }
        yield gpu, Batch(**arrays), cast(Float32, gpu.result((len(batch),), "float32"))
