"""Build an engine: a bundle in, a checked folder out, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from ...arguments import Arguments, StrPath
from ...bundle import IMAGE_ENCODER, JOINT_ENCODER, TOKENIZER, BundleManifest
from ...errors import EngineError
from ...files import publish_folder, refuse_existing, sha256_of
from ..contract import BESIDE_8_BITS, Backend, BuildJob, OpenOptions, Progress
from ..fidelity import Fidelity, measure, measure_fidelity, not_measured
from ..manifest import MANIFEST, EngineManifest, Profile
from ..precision.emulate import scorer
from ..precision.graph import Graph
from ..precision.prepare import GraphCache, Recipe
from ..registry import require_builder
from ..samples import RandomSamples, Samples, SomeSamples
from ..scales import scales_of
from ..shallow.depth import Shallow, make_shallow
from .options import AUTO, EngineOptions, EngineRequest, auto_faults

# A shallow engine's head is fitted on the others, its fidelity is measured on each fourth query.
MEASURED_STEP = 4
EMULATED = "emulation of the graph in float32 on the CPU"


def build_engine(
    bundle: StrPath,
    out: StrPath,
    *,
    backend: str = AUTO,
    precision: str | None = None,
    calibration: Samples | None = None,
    options: EngineOptions | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    first_out: StrPath | None = None,
) -> EngineManifest:
    """Build the engine folder `out` from the bundle folder `bundle`; return its manifest.

    `auto` builds every backend and precision that this machine runs, times those that hold the
    limits, and keeps the fastest: `build_options["auto"]` of the manifest says what was tried.

    Args:
        backend: `auto`, or a name that `edje doctor` lists, as `openvino`.
        precision: what the matrix products run in; None: `fp32`, or what `auto` chooses.
        calibration: pairs to scale int8 and fp8 by, and to measure any precision on; None: random
            ones, and no int8 or fp8.
        options: the rest; None: the defaults.
        overwrite: replace `out` if it is an engine folder.
        progress: called with one short line before each step.
        first_out: with `auto`, another engine folder: for one that is faster before `out`, as the
            first stage of a cascade; it is written where such a pair reaches a top k sooner.

    Raises:
        CheckpointError: `bundle` is no model bundle.
        EngineError: backend, precision or profile that cannot be, files missing in the bundle,
            limits that do not hold, a failed build; nothing is left behind.
        EdjeError: `out` holds something (with `overwrite`: no engine), or cannot be written.
        RequestError: arguments of another kind (all of them), before any work.
    """
    given, asked = Arguments("build_engine"), "fp32" if precision is None else precision
    request = EngineRequest.take(given, bundle, backend, asked, calibration, options)
    out = given.path("out", out)
    first = None if first_out is None else given.path("first_out", first_out)
    given.flag("overwrite", overwrite)
    given.callback("progress", progress)
    given.check()
    progress = progress or (lambda _: None)
    faults = auto_faults(precision, request.options.backend_options) if backend == AUTO else []
    if first is not None and (backend != AUTO or request.options.is_first):
        faults.append("--first-out: only auto chooses two engines, whole ones")
    if faults:
        raise EngineError("the fastest backend is chosen by measuring", faults=faults)
    refuse_existing(out, overwrite, MANIFEST)
    with shallow_graph(request, progress) as shallow:
        if backend != AUTO:
            return build_one(request, out, overwrite=overwrite, progress=progress, shallow=shallow)
        from .auto import build_fastest

        return build_fastest(
            request, out, overwrite=overwrite, progress=progress, shallow=shallow, first_out=first
        )


@contextmanager
def shallow_graph(request: EngineRequest, progress: Progress) -> Iterator[Shallow | None]:
    """Yield the graph of the first layers, for the block; None where all are asked for.

    Raises:
        EngineError: no real pairs to fit a head on, or a number of layers that cannot be.
    """
    layers, pairs = request.options.layers, request.calibration
    if layers is None:
        yield None
        return
    check_files(request.bundle, [JOINT_ENCODER])
    source = BundleManifest.read(request.bundle)
    profile = request.options.profile(source.text.max_wordpieces)
    if pairs is not None and len(pairs) >= MEASURED_STEP:
        pairs = SomeSamples(pairs, MEASURED_STEP, others=True)
    with TemporaryDirectory() as scratch:
        graph = Path(scratch) / JOINT_ENCODER
        yield make_shallow(
            request.bundle / JOINT_ENCODER, graph, layers, pairs, source, profile, progress
        )


def build_one(
    request: EngineRequest,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda _: None,
    graphs: GraphCache | None = None,
    shallow: Shallow | None = None,
) -> EngineManifest:
    """Build with one backend in one precision; raises as `build_engine` does.

    Args:
        graphs: prepared graphs to share with other builds from this bundle and calibration.
        shallow: the graph to build from in place of the bundle's.
    """
    began = perf_counter()
    bundle, options = request.bundle, request.options
    source = BundleManifest.read(bundle)
    module = require_builder(request.backend, request.precision, options.backend_options)
    profile = options.profile(source.text.max_wordpieces)
    copied = [TOKENIZER, *([IMAGE_ENCODER] if options.image_encoder else [])]
    check_files(bundle, [JOINT_ENCODER, *copied])
    graphs = graphs or GraphCache(None)
    build = _Build(request, source, module, profile, progress, graphs, shallow)
    with publish_folder(out, manifest=MANIFEST, overwrite=overwrite) as folder:
        for name in copied:
            shutil.copyfile(bundle / name, folder / name)
        draft = build.into(folder)
        manifest = replace(draft, build_seconds=round(perf_counter() - began, 3))
        manifest.write(folder)
    return manifest


@dataclass(frozen=True, slots=True)
class _Build:
    """One build, checked and ready to go."""

    request: EngineRequest
    source: BundleManifest
    module: Backend
    profile: Profile
    progress: Progress
    graphs: GraphCache
    shallow: Shallow | None

    @property
    def recipe(self) -> Recipe:
        """What to make of the bundle's graph."""
        request = self.request
        return Recipe(
            request.precision,
            self.module.compute_type(request.precision),
            request.options.token_dtype,
            request.calibration,
            request.options.limits_to_hold,
            scales_of(self.module, request.precision, self.source.sizes),
            getattr(self.module, "OPERANDS_ONLY", False),
        )

    def into(self, folder: Path) -> EngineManifest:
        """Write the backend's files; return the manifest, but for the seconds it took."""
        request, shallow = self.request, self.shallow
        source = request.bundle / JOINT_ENCODER if shallow is None else shallow.graph
        prepared = (source, self.recipe, self.source, self.profile, self.progress)
        with self.graphs.prepared(*prepared) as (graph, plan):
            self.progress(f"building {request.backend} {request.precision}")
            job = BuildJob(
                graph,
                folder,
                request.precision,
                request.options.token_dtype,
                self.profile,
                self.source,
                request.options.backend_options,
                self.progress,
            )
            if shallow is not None:
                plan = {**plan, "shallow": shallow.facts}
            made = self.made(job, plan)
            if BESIDE_8_BITS in made.build_options and self.breaks_limits(made):
                narrow = made.build_options[BESIDE_8_BITS]
                self.progress(f"{narrow} beside 8 bits breaks the limits, building without")
                made = self.made(replace(job, strict=True), plan)
            return made

    def made(self, job: BuildJob, plan: Mapping[str, Any]) -> EngineManifest:
        """Build, describe and measure."""
        draft = self.manifest(job.out, plan, {**self.module.build(job), **_asked(self.request)})
        return replace(draft, fidelity=self.measured(job, draft))

    def breaks_limits(self, made: EngineManifest) -> bool:
        """Tell whether real pairs, in full depth, say so."""
        samples, fidelity = self.request.calibration, Fidelity.from_json(made.fidelity)
        if samples is None or samples.random or self.shallow is not None or fidelity is None:
            return False
        return bool(self.request.options.limits_to_hold.broken_by(fidelity))

    def manifest(
        self, folder: Path, plan: Mapping[str, Any], flags: Mapping[str, Any]
    ) -> EngineManifest:
        """Describe what was built, but for what is not known yet."""
        return EngineManifest(
            backend=self.request.backend,
            backend_version=self.module.version(),
            precision=self.request.precision,
            device=self.module.device(self.request.precision, self.request.options.backend_options),
            profile=self.profile,
            bundle=self.source,
            bundle_path=str(self.request.bundle.absolute()),
            onnx_sha256=sha256_of(self.request.bundle / JOINT_ENCODER),
            precision_plan=plan,
            layers=self.source.sizes.num_layers if self.shallow is None else self.shallow.layers,
            token_dtype=self.request.options.token_dtype,
            files=_hashes(folder),
            build_options=flags,
            build_seconds=0.0,
            fidelity={},
        )

    def measured(self, job: BuildJob, draft: EngineManifest) -> Mapping[str, Any]:
        """Measure the engine where this machine runs it, else its graph, and say which."""
        samples, bundle = self.request.calibration, self.request.bundle
        if self.shallow is not None and samples is not None and len(samples) >= MEASURED_STEP:
            samples = SomeSamples(samples, MEASURED_STEP)
        if self.module.why_not(job.precision) is None:
            engine = self.module.load(job.out, draft, OpenOptions())
            try:
                return measure_fidelity(engine, bundle, samples, self.progress)
            finally:
                engine.close()
        emulated = measure(
            scorer(Graph.read(job.graph)),
            bundle,
            samples or RandomSamples(self.source),
            self.profile,
            measured_on=EMULATED,
            token_dtype=job.token_dtype,
            progress=self.progress,
        )
        return not_measured(emulated)


def check_files(bundle: Path, names: Sequence[str]) -> None:
    """Raise EngineError if the bundle lacks some of the files `names` (all are named)."""
    missing = [f"{name}: missing" for name in names if not (bundle / name).is_file()]
    if missing:
        raise EngineError(
            f"the bundle {bundle} lacks what this engine needs",
            faults=missing,
            hint="export it again (an image encoder needs `edje export ... --vision-model DIR`)",
        )


def _asked(request: EngineRequest) -> dict[str, Any]:
    """Return the entries of `build_options` that another build needs to give the same engine."""
    options, pairs = request.options, request.calibration
    limits = options.limits_to_hold
    asked: dict[str, Any] = {} if limits == options.default_limits else asdict(limits)
    if options.layers is not None:
        asked["layers"] = options.layers
    elif options.is_first:
        asked["role"] = options.role
    return {
        "image_encoder": options.image_encoder,
        **({} if pairs is None else pairs.build_options),
        **{name: limit for name, limit in asked.items() if limit is not None},
    }


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
