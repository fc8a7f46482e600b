"""Build an engine: a bundle in, a checked folder out, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from ..bundle import IMAGE_ENCODER, JOINT_ENCODER, TOKENIZER, BundleManifest
from ..errors import EngineError
from ..files import sha256_of
from ..folders import publish_folder
from .backends import require_builder
from .contract import Backend, BuildJob, BuildOptions, OpenOptions, Progress
from .fidelity import measure_fidelity
from .manifest import (
    DEFAULT_MAX_PAIRS,
    DEFAULT_TEXT_BUCKETS,
    MANIFEST,
    EngineManifest,
    Profile,
)


def build_engine(
    bundle: Path,
    out: Path,
    *,
    backend: str,
    precision: str,
    max_pairs: int = DEFAULT_MAX_PAIRS,
    text_buckets: Sequence[int] = DEFAULT_TEXT_BUCKETS,
    image_encoder: bool = False,
    overwrite: bool = False,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> EngineManifest:
    """Build the engine folder `out` from the bundle folder `bundle`, for this machine.

    Args:
        backend: command-line name, as `openvino`.
        precision: what the matrix products run in, as `fp32`.
        max_pairs: the most pairs of one batch.
        text_buckets: numbers of text slots, CLS and SEP included; 64 holds the longest query.
        image_encoder: also copy `image_encoder.onnx`, so that the folder can index images.
        overwrite: replace `out` if it is an engine folder.
        options: how the backend builds.
        progress: called with one short line before each step.

    Returns:
        What was written as `engine.json`.

    Raises:
        CheckpointError: `bundle` is no model bundle.
        EngineError: backend, precision or profile that cannot be, files missing in the bundle,
            or a failed build; nothing is left behind.
        EdjeError: `out` exists or cannot be written.
    """
    began = perf_counter()
    bundle, out = Path(bundle), Path(out)
    tell = progress or (lambda _: None)
    source = BundleManifest.read(bundle)
    options = options or BuildOptions()
    module = require_builder(backend, precision, options)
    profile = checked_profile(max_pairs, text_buckets, source.text.max_wordpieces)
    names = [TOKENIZER, *([IMAGE_ENCODER] if image_encoder else [])]
    _check_files(bundle, [JOINT_ENCODER, *names])
    _check_target(out, overwrite)
    with publish_folder(out, overwrite=overwrite) as folder:
        for name in names:
            shutil.copyfile(bundle / name, folder / name)
        job = BuildJob(
            graph=bundle / JOINT_ENCODER,
            out=folder,
            precision=precision,
            token_dtype="float16",
            profile=profile,
            bundle=source,
            options=options,
            progress=tell,
        )
        tell(f"building {backend} {precision}")
        flags = {**module.build(job), "image_encoder": image_encoder}
        draft = _manifest(job, backend, module, bundle, flags)
        tell("measuring fidelity against the float32 bundle")
        fidelity = _measure(module, folder, draft, bundle)
        seconds = round(perf_counter() - began, 3)
        manifest = replace(draft, fidelity=fidelity, build_seconds=seconds)
        manifest.write(folder)
    return manifest


def _manifest(
    job: BuildJob, backend: str, module: Backend, bundle: Path, flags: Mapping[str, Any]
) -> EngineManifest:
    """Describe what was built, but for what only the end of the build knows."""
    return EngineManifest(
        backend=backend,
        backend_version=module.version(),
        precision=job.precision,
        device=module.device(job.precision, job.options),
        profile=job.profile,
        bundle=job.bundle,
        bundle_path=str(bundle.absolute()),
        onnx_sha256=sha256_of(bundle / JOINT_ENCODER),
        precision_plan={},
        token_dtype=job.token_dtype,
        files=_hashes(job.out),
        build_options=flags,
        build_seconds=0.0,
        fidelity={},
    )


def checked_profile(max_pairs: int, text_buckets: Sequence[int], max_wordpieces: int) -> Profile:
    """Return the profile with its buckets in ascending order, each once.

    Raises:
        EngineError: sizes that no engine of this model can have (all named).
    """
    longest = max_wordpieces + 3  # 64 in the official model: 61, CLS, SEP, rounded up
    faults = []
    if max_pairs < 1:
        faults.append(f"max_pairs: got {max_pairs}, expected 1 or more")
    if not text_buckets:
        faults.append("text_buckets: got none, expected at least one")
    faults += [
        f"text_buckets: got {bucket}, expected 3 (CLS, one wordpiece, SEP) to {longest}"
        for bucket in text_buckets
        if not 3 <= bucket <= longest
    ]
    if faults:
        raise EngineError("no engine can have this profile", faults=faults)
    return Profile(int(max_pairs), tuple(sorted({int(bucket) for bucket in text_buckets})))


def _check_files(bundle: Path, names: Sequence[str]) -> None:
    missing = [f"{name}: missing" for name in names if not (bundle / name).is_file()]
    if missing:
        raise EngineError(
            f"the bundle {bundle} lacks what this engine needs",
            faults=missing,
            hint="export it again (an image encoder needs `edje export ... --vision-model DIR`)",
        )


def _check_target(out: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an engine: `--overwrite --out ~` must not empty a home."""
    if not (overwrite and out.exists()):
        return
    empty = out.is_dir() and not any(out.iterdir())
    if not empty and not (out / MANIFEST).is_file():
        raise EngineError(
            f"{out} exists and is not an engine folder; it is left as it was",
            hint="choose another --out",
        )


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}


def _measure(
    backend: Backend, folder: Path, draft: EngineManifest, bundle: Path
) -> Mapping[str, Any]:
    engine = backend.load(folder, draft, OpenOptions())
    try:
        return measure_fidelity(engine, bundle)
    finally:
        engine.close()
