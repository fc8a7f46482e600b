"""Build an engine: a bundle in, a checked folder out, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from ...arguments import Arguments, StrPath, is_whole, path_of, shown
from ...bundle import IMAGE_ENCODER, JOINT_ENCODER, TOKENIZER, BundleManifest
from ...errors import EngineError
from ...files import publish_folder, sha256_of
from ..contract import Backend, BuildJob, BuildOptions, OpenOptions, Progress
from ..fidelity import FidelityLimits, measure, measure_fidelity, not_measured
from ..manifest import DEFAULT_MAX_PAIRS, DEFAULT_TEXT_BUCKETS, MANIFEST, EngineManifest, Profile
from ..precision.emulate import scorer
from ..precision.graph import Graph
from ..precision.prepare import DEFAULT_LIMITS, GraphCache, Recipe
from ..registry import require_builder
from ..samples import RandomSamples, Samples

TOKEN_DTYPES = ("float16", "int8")
EMULATED = "emulation of the graph in float32 on the CPU"


def build_engine(
    bundle: StrPath,
    out: StrPath,
    *,
    backend: str,
    precision: str,
    max_pairs: int = DEFAULT_MAX_PAIRS,
    text_buckets: Iterable[int] = DEFAULT_TEXT_BUCKETS,
    token_dtype: str = "float16",
    calibration: Samples | None = None,
    limits: FidelityLimits | None = None,
    image_encoder: bool = False,
    overwrite: bool = False,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
    graphs: GraphCache | None = None,
) -> EngineManifest:
    """Build the engine folder `out` from the bundle folder `bundle`; return its manifest.

    Args:
        backend: command-line name, as `openvino`.
        precision: what the matrix products run in, as `fp32`.
        max_pairs, text_buckets: the engine's `Profile`; 64 slots hold the longest query.
        token_dtype: of the stored tokens: `float16`, or `int8` with a scale a token.
        calibration: pairs to scale int8 and fp8 by, and to measure any precision on (None:
            random ones); `limits`: what int8 and fp8 must hold on them, None: the defaults.
        image_encoder: also copy `image_encoder.onnx`, so that the folder can index images.
        overwrite: replace `out` if it is an engine folder.
        options: how the backend builds.
        progress: called with one short line before each step.
        graphs: prepared graphs to share with other builds from `bundle` and `calibration`.

    Raises:
        CheckpointError: `bundle` is no model bundle.
        EngineError: backend, precision or profile that cannot be, files missing in the bundle,
            limits that do not hold, a failed build; nothing is left behind.
        EdjeError: `out` holds something (with `overwrite`: no engine), or cannot be written.
    """
    began = perf_counter()
    bundle, out, options = path_of("bundle", bundle), path_of("out", out), options or BuildOptions()
    source = BundleManifest.read(bundle)
    module = require_builder(backend, precision, options)
    profile = checked_profile(max_pairs, text_buckets, source.text.max_wordpieces)
    check_token_dtype(token_dtype)
    copied = [TOKENIZER, *([IMAGE_ENCODER] if image_encoder else [])]
    check_files(bundle, [JOINT_ENCODER, *copied])
    typed = (precision, module.compute_type(precision), token_dtype)
    recipe = Recipe(*typed, calibration, limits or DEFAULT_LIMITS)
    parts = (bundle, source, backend, module, profile, recipe, options)
    build = _Build(*parts, progress or (lambda _: None), graphs or GraphCache(None))
    with publish_folder(out, manifest=MANIFEST, overwrite=overwrite) as folder:
        for name in copied:
            shutil.copyfile(bundle / name, folder / name)
        draft = build.into(folder, {"image_encoder": image_encoder, **_asked(recipe)})
        manifest = replace(draft, build_seconds=round(perf_counter() - began, 3))
        manifest.write(folder)
    return manifest


@dataclass(frozen=True, slots=True)
class _Build:
    """One build, checked and ready to go."""

    bundle: Path
    source: BundleManifest
    backend: str
    module: Backend
    profile: Profile
    recipe: Recipe
    options: BuildOptions
    tell: Progress
    graphs: GraphCache

    def into(self, folder: Path, flags: Mapping[str, Any]) -> EngineManifest:
        """Write the backend's files; return the manifest, but for the seconds it took."""
        recipe, source = self.recipe, self.bundle / JOINT_ENCODER
        with self.graphs.prepared(source, recipe, self.source, self.profile, self.tell) as found:
            graph, plan = found
            self.tell(f"building {self.backend} {recipe.precision}")
            job = BuildJob(
                graph,
                folder,
                recipe.precision,
                recipe.token_dtype,
                self.profile,
                self.source,
                self.options,
                self.tell,
            )
            draft = self.manifest(folder, plan, {**self.module.build(job), **flags})
            return replace(draft, fidelity=self.measured(job, draft))

    def manifest(
        self, folder: Path, plan: Mapping[str, Any], flags: Mapping[str, Any]
    ) -> EngineManifest:
        """Describe what was built, but for what is not known yet."""
        return EngineManifest(
            backend=self.backend,
            backend_version=self.module.version(),
            precision=self.recipe.precision,
            device=self.module.device(self.recipe.precision, self.options),
            profile=self.profile,
            bundle=self.source,
            bundle_path=str(self.bundle.absolute()),
            onnx_sha256=sha256_of(self.bundle / JOINT_ENCODER),
            precision_plan=plan,
            token_dtype=self.recipe.token_dtype,
            files=_hashes(folder),
            build_options=flags,
            build_seconds=0.0,
            fidelity={},
        )

    def measured(self, job: BuildJob, draft: EngineManifest) -> Mapping[str, Any]:
        """Measure the engine where this machine runs it, else its graph, and say which."""
        samples = self.recipe.calibration
        if self.module.why_not(job.precision) is None:
            engine = self.module.load(job.out, draft, OpenOptions())
            try:
                return measure_fidelity(engine, self.bundle, samples, self.tell)
            finally:
                engine.close()
        emulated = measure(
            scorer(Graph.read(job.graph)),
            self.bundle,
            samples or RandomSamples(self.source),
            self.profile,
            measured_on=EMULATED,
            token_dtype=job.token_dtype,
            progress=self.tell,
        )
        return not_measured(emulated)


def checked_profile(max_pairs: int, text_buckets: Iterable[int], max_wordpieces: int) -> Profile:
    """Return the profile with its buckets in ascending order, each once.

    Raises:
        EngineError: sizes that no engine of this model can have (all named).
    """
    longest = max_wordpieces + 3  # 64 in the official model: 61, CLS, SEP, rounded up
    given = Arguments("a profile")
    buckets, faults = given.items("text_buckets", text_buckets, "whole numbers"), given.faults
    if not is_whole(max_pairs):
        faults.append(f"max_pairs: got {shown(max_pairs)}, expected 1 or more")
    if not (buckets or faults):
        faults.append("text_buckets: got none, expected at least one")
    faults += [
        f"text_buckets: got {shown(bucket)}, expected 3 (CLS, one wordpiece, SEP) to {longest}"
        for bucket in buckets
        if not (is_whole(bucket, 3) and bucket <= longest)
    ]
    if faults:
        raise EngineError("no engine can have this profile", faults=faults)
    return Profile(int(max_pairs), tuple(sorted({int(bucket) for bucket in buckets})))


def check_token_dtype(token_dtype: str) -> None:
    """Raise EngineError if no engine takes tokens of this dtype."""
    if token_dtype not in TOKEN_DTYPES:
        raise EngineError(f"token_dtype is {token_dtype!r}, expected {' or '.join(TOKEN_DTYPES)}")


def check_files(bundle: Path, names: Sequence[str]) -> None:
    """Raise EngineError if the bundle lacks some of the files `names` (all are named)."""
    missing = [f"{name}: missing" for name in names if not (bundle / name).is_file()]
    if missing:
        raise EngineError(
            f"the bundle {bundle} lacks what this engine needs",
            faults=missing,
            hint="export it again (an image encoder needs `edje export ... --vision-model DIR`)",
        )


def _asked(recipe: Recipe) -> dict[str, Any]:
    """Return the entries of `build_options` that say how the graph was to be calibrated."""
    asked = {**asdict(recipe.limits)} if recipe.limits != DEFAULT_LIMITS else {}
    pairs = recipe.calibration
    return {
        **({} if pairs is None else pairs.build_options),
        **{name: limit for name, limit in asked.items() if limit is not None},
    }


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
