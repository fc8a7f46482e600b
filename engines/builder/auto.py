"""`--backend auto`: build what this machine runs, measure it, keep the fastest that is faithful."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from ...bundle import IMAGE_ENCODER, BundleManifest
from ...errors import EngineError
from ...files import publish_folder, refuse_existing, sha256_of
from ..contract import Batch, Engine, Progress
from ..fidelity import Fidelity, batch_on_gpu, engine_scorer
from ..manifest import MANIFEST, QUANTIZED, EngineManifest
from ..precision.prepare import GraphCache
from ..registry import open_engine, probe_backends
from ..samples import RandomSamples, RankingSample, Samples, int8_batch, sample_batches
from ..shallow.depth import Shallow
from .build import build_one, check_files
from .options import FIRST, EngineRequest
from .pair import best_pair
from .trial import Trial

NUM_ROUNDS, MOST_ROUNDS = 5, 12
SETTLED = 0.02  # how far an engine's two least times may lie apart
BATCH_PAIRS, GPU_BATCH_PAIRS = 64, 1024  # at most: 64 pairs would leave a GPU half idle
GPU_FORWARDS = 4  # enqueued one after the other, as requests do
NOTHING_TO_CALIBRATE = "needs real pairs to calibrate with, none were given"


def build_fastest(
    request: EngineRequest,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
    shallow: Shallow | None = None,
    first_out: Path | None = None,
    trials: Path | None = None,
) -> EngineManifest:
    """Build `out` with the fastest faithful backend and precision that this machine has.

    Everything that runs here, on CPU and GPU, is built in a scratch folder, those that hold the
    limits are timed interleaved on one query's pairs, and the fastest becomes `out`;
    `build_options["auto"]` of its manifest says what was tried and measured, and why the rest was
    not. int8 and fp8 are only tried with real pairs.

    Args:
        request: what is asked for; its backend and precision are chosen here.
        shallow: the graph to build from in place of the bundle's.
        first_out: where an engine goes that is faster before this one, in a cascade; nothing is
            written there where no such pair pays, and `build_options["pair"]` says so.
        trials: an empty folder that keeps all that was built, `<backend>-<precision>` each.

    Raises:
        EngineError: nothing can be built here, or nothing holds the limits (all reasons); a
            profile that cannot be.
        CheckpointError, EdjeError: as `build_engine`.
    """
    bundle, calibration, options = request.bundle, request.calibration, request.options
    source = BundleManifest.read(bundle)
    options.profile(source.text.max_wordpieces)
    for wanted in filter(None, (out, first_out)):
        refuse_existing(wanted, overwrite, MANIFEST)
    check_files(bundle, [IMAGE_ENCODER] if options.image_encoder else [])
    with TemporaryDirectory() as scratch:
        graphs = GraphCache(Path(scratch) / "graphs")
        root, tried = trials or Path(scratch), _candidates(calibration)
        folders = {root / f"{trial.backend}-{trial.precision}": trial for trial in tried}
        if first_out is not None:
            folders |= {
                folder.with_name(f"{folder.name}-first"): replace(trial, is_first=True)
                for folder, trial in folders.items()
                if trial.precision in QUANTIZED
            }
        for folder, trial in folders.items():
            if trial.not_tried is None:
                folders[folder] = _try(request, folder, trial, progress, graphs, shallow)
        progress("timing what was built")
        samples = RandomSamples(source) if calibration is None else calibration
        folders = _timed(folders, next(iter(samples)))
        pair = best_pair(folders)
        if pair is None:
            raise _nothing_faithful(folders.values())
        more: dict[str, Any] = {"auto": [asdict(trial) for trial in folders.values()]}
        if first_out is not None:
            more["pair"] = pair.to_json(folders)
            if pair.first is not None:
                _publish(pair.first, request, first_out, overwrite, more)
        return _publish(pair.engine, request, out, overwrite, more)


def _candidates(calibration: Samples | None) -> list[Trial]:
    """Return every backend and precision, with the reason where it cannot be tried."""
    uncalibrated = calibration is None or calibration.random
    return [
        Trial(
            status.name,
            precision,
            not_tried=why_not
            or status.builds[precision]
            or (NOTHING_TO_CALIBRATE if uncalibrated and precision in QUANTIZED else None),
        )
        for status in probe_backends()
        for precision, why_not in status.runs.items()
    ]


def _try(
    request: EngineRequest,
    folder: Path,
    trial: Trial,
    progress: Progress,
    graphs: GraphCache,
    shallow: Shallow | None,
) -> Trial:
    """Build one engine and hold it against the limits."""
    options = replace(request.options, image_encoder=False)  # copied once, at the end
    if trial.is_first:
        options = replace(options, role=FIRST, limits=None)
    backend, precision = trial.backend, trial.precision
    asked = replace(request, backend=backend, precision=precision, options=options)
    try:
        manifest = build_one(asked, folder, progress=progress, graphs=graphs, shallow=shallow)
    except EngineError as error:
        reasons = "; ".join(error.faults)
        refused = f"{error.message}: {reasons}" if reasons else error.message
        return replace(trial, refused=refused)
    fidelity = Fidelity.from_json(manifest.fidelity)
    if fidelity is None:
        return replace(trial, refused="its fidelity could not be measured")
    # Of a shallow engine the limits hold against its own float32 graph: its head costs more.
    broken = options.limits_to_hold.broken_by(fidelity) if shallow is None else []
    return replace(
        trial,
        kendall_tau=fidelity.kendall_tau,
        top_1=fidelity.top_1,
        rescored=fidelity.rescored,
        refused="; ".join(broken) or None,
    )


def _timed(folders: Mapping[Path, Trial], sample: RankingSample) -> dict[Path, Trial]:
    """Time the engines that were not refused, in turns."""
    good = [f for f, t in folders.items() if t.refused is None and t.not_tried is None]
    took: dict[Path, list[float]] = {folder: [] for folder in good}
    with ExitStack() as stack:
        engines = {folder: stack.enter_context(closing(open_engine(folder))) for folder in good}
        turns = {f: stack.enter_context(_turn(engine, sample)) for f, engine in engines.items()}
        for number in range(1 + MOST_ROUNDS):  # the first also warms up
            if number > NUM_ROUNDS and all(map(_has_settled, took.values())):
                break
            start = number % max(1, len(good))  # none always follows the same one
            for folder in good[start:] + good[:start]:
                began = perf_counter()
                turns[folder].run()
                took[folder].append(perf_counter() - began)
    rates = {f: round(turns[f].num_pairs / min(seconds), 1) for f, seconds in took.items()}
    return {
        folder: replace(trial, pairs_per_s=rates.get(folder)) for folder, trial in folders.items()
    }


def _has_settled(took: Sequence[float]) -> bool:
    """Tell whether the two least times agree: on a busy machine they need more rounds."""
    least, second = sorted(took)[:2]
    return second <= least * (1 + SETTLED)


@dataclass(frozen=True, slots=True)
class _Turn:
    """What is timed at once: `run` scores `num_pairs` pairs and waits until they have scores."""

    run: Callable[[], object]
    num_pairs: int


@contextmanager
def _turn(engine: Engine, sample: RankingSample) -> Iterator[_Turn]:
    """Yield an engine's turn; its pairs lie where it runs."""
    batch = _batch(sample, engine)
    if not engine.on_device:
        yield _Turn(partial(engine_scorer(engine), batch), len(batch))
        return
    with batch_on_gpu(engine, batch) as (gpu, there, scores):

        def run() -> None:
            for _ in range(GPU_FORWARDS):
                engine.enqueue(there, scores, stream=gpu.stream)
            gpu.synchronize()

        yield _Turn(run, GPU_FORWARDS * len(batch))


def _batch(sample: RankingSample, engine: Engine) -> Batch:
    """Return pairs of one query as `engine` reads them, some twice where it has too few."""
    manifest = engine.manifest
    most = GPU_BATCH_PAIRS if engine.on_device else BATCH_PAIRS
    num_pairs = min(most, manifest.profile.max_pairs)
    candidates = np.resize(np.arange(len(sample.tokens)), num_pairs)
    longer = replace(sample, tokens=sample.tokens[candidates])
    text = manifest.bundle.text
    (batch,) = sample_batches(longer, manifest.profile, pad_id=text.pad_id, sep_id=text.sep_id)
    return int8_batch(batch) if manifest.token_dtype == "int8" else batch


def _nothing_faithful(trials: Iterable[Trial]) -> EngineError:
    return EngineError(
        "no backend of this machine gives a faithful engine",
        faults=[f"{t.backend} {t.precision}: {_why(t)}" for t in trials if not t.is_first],
        hint="`edje doctor` says what is missing; --min-kendall-tau lowers the limit",
    )


def _why(trial: Trial) -> str | None:
    return trial.refused or f"not tried: {trial.not_tried}"


def _publish(
    engine: Path, request: EngineRequest, out: Path, overwrite: bool, more: Mapping[str, Any]
) -> EngineManifest:
    """Copy the engine that was timed to `out`; its manifest gets `more`, what was tried."""
    manifest = EngineManifest.read(engine)
    bundle, image_encoder = request.bundle, request.options.image_encoder
    options = {**manifest.build_options, "image_encoder": image_encoder, **more}
    with publish_folder(out, manifest=MANIFEST, overwrite=overwrite) as folder:
        shutil.copytree(engine, folder, dirs_exist_ok=True)
        files = dict(manifest.files)
        if image_encoder:
            shutil.copyfile(bundle / IMAGE_ENCODER, folder / IMAGE_ENCODER)
            files[IMAGE_ENCODER] = sha256_of(folder / IMAGE_ENCODER)
        manifest = replace(manifest, build_options=options, files=files)
        manifest.write(folder)
    return manifest
