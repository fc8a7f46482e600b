"""`edje build`: its options are many, so they live beside the other verbs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...engines.manifest import DEFAULT_MAX_PAIRS, DEFAULT_TEXT_BUCKETS, EngineManifest
from ...errors import RequestError
from ...show import note, print_facts, print_json, print_table, progress_steps
from .options import Json, Overwrite, refuse, verb_of

if TYPE_CHECKING:
    from ...engines.build_options import BuildOptions
    from ...engines.builder.options import EngineOptions
    from ...engines.samples import Samples

AUTO = "auto"
TEXT_BUCKETS = ",".join(map(str, DEFAULT_TEXT_BUCKETS))
# Enough pairs to tell tau to about 0.005; a full-size model scores them in 15 s on two cores.
CALIBRATION_QUERIES, CALIBRATION_CANDIDATES = 48, 24
# A shallow engine's head has 1,152 weights, and a fourth of the queries measures it.
FITTING_QUERIES, FITTING_CANDIDATES = 64, 100


@dataclass(frozen=True, slots=True)
class BuildArguments:
    """The words of `edje build`: each field is an argument or an option of the command line."""

    bundle: Annotated[Path, typer.Argument(help="Bundle folder, written by `edje export`.")]
    out: Annotated[Path, typer.Option(help="Engine folder to write.")]
    backend: Annotated[
        str, typer.Option(help="auto (the fastest faithful one), or one that `edje doctor` lists.")
    ] = AUTO
    precision: Annotated[
        str | None, typer.Option(help="fp32 (default), bf16, fp16, int8, fp8; not with auto.")
    ] = None
    max_pairs: Annotated[int, typer.Option(help="Largest batch.")] = DEFAULT_MAX_PAIRS
    text_buckets: Annotated[
        str, typer.Option(help="Text lengths (CLS and SEP included) to build for.")
    ] = TEXT_BUCKETS
    tokens: Annotated[str, typer.Option(help="Stored tokens: float16, or int8.")] = "float16"
    calibration_store: Annotated[
        Path | None, typer.Option(help="Token store with images to calibrate int8 and fp8 on.")
    ] = None
    calibration_queries: Annotated[
        Path | None, typer.Option(help="Queries over them: a line each, `query[TAB]target id`.")
    ] = None
    calibration_random: Annotated[
        bool, typer.Option("--calibration-random", help="Made-up pairs: for speed tests only.")
    ] = False
    layers: Annotated[
        str | None,
        typer.Option(
            help="Only so many of the first layers (or auto), for a cascade's first stage."
        ),
    ] = None
    role: Annotated[
        str, typer.Option(help="alone, or first: of a cascade, whose survivors are rescored.")
    ] = "alone"
    first_out: Annotated[
        Path | None,
        typer.Option(help="auto: write a faster engine to put before OUT, where one pays."),
    ] = None
    min_kendall_tau: Annotated[
        float | None, typer.Option(help="Least rank agreement with float32; default: 0.975.")
    ] = None
    max_top1_change: Annotated[
        float | None, typer.Option(help="Largest share of changed first places; default: 0.02.")
    ] = None
    workspace_mb: Annotated[
        int | None, typer.Option(help="tensorrt, tensorrt-rtx: most memory of a kernel.")
    ] = None
    optimization_level: Annotated[
        int | None, typer.Option(help="tensorrt, tensorrt-rtx: 0 to 5.")
    ] = None
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(metavar="<str>", help="native, tensorrt-rtx: a GPU, as 8.9; default: all."),
    ] = None
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="tensorrt: run on later GPUs too.")
    ] = False
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="tensorrt: run with later versions too.")
    ] = False
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="native, tensorrt, tensorrt-rtx: write report.json, the kernels."
        ),
    ] = False
    image_encoder: Annotated[
        bool, typer.Option("--image-encoder", help="Add the image encoder, to index with.")
    ] = False
    overwrite: Overwrite = False
    as_json: Json = False

    def engine_options(self) -> EngineOptions:
        """Return what the engine shall be; refuse options that cannot be meant."""
        from ...engines.builder.options import EngineOptions
        from ...engines.fidelity import FidelityLimits
        from ...engines.precision.prepare import DEFAULT_LIMITS

        backend_options = self._backend_options()
        self._check(backend_options)
        tau, change = self.min_kendall_tau, self.max_top1_change
        limits = None  # by role
        if tau is not None or change is not None:
            limits = FidelityLimits(
                DEFAULT_LIMITS.min_kendall_tau if tau is None else tau,
                DEFAULT_LIMITS.max_top1_change if change is None else change,
            )
        return EngineOptions(
            max_pairs=self.max_pairs,
            text_buckets=_whole_numbers(self.text_buckets, "--text-buckets"),
            token_dtype=self.tokens,
            limits=limits,
            role=self.role,
            layers=_layers(self.layers),
            image_encoder=self.image_encoder,
            backend_options=backend_options,
        )

    def samples(self) -> AbstractContextManager[Samples | None]:
        """Open the pairs to calibrate with; none where none were asked for."""
        from ...bundle import BundleManifest
        from ...engines.samples import RandomSamples
        from ..queries import StoreSamples

        if self.calibration_random:
            return nullcontext(RandomSamples(BundleManifest.read(self.bundle)))
        if self.calibration_store is None or self.calibration_queries is None:
            return nullcontext(None)
        return StoreSamples.open(
            self.calibration_store,
            self.bundle,
            self.calibration_queries,
            num_candidates=CALIBRATION_CANDIDATES if self.layers is None else FITTING_CANDIDATES,
            max_queries=CALIBRATION_QUERIES if self.layers is None else FITTING_QUERIES,
        )

    def _check(self, options: BuildOptions) -> None:
        """Refuse options that contradict each other, and values that no backend can take."""
        from ...engines.build_options import raise_option_faults
        from ...engines.builder.options import auto_faults

        raise_option_faults(options)
        faults = auto_faults(self.precision, options) if self.backend == AUTO else []
        if (self.calibration_store is None) != (self.calibration_queries is None):
            faults.append("--calibration-store and --calibration-queries: one needs the other")
        if self.calibration_random and self.calibration_store is not None:
            faults.append("--calibration-random: there is a --calibration-store already")
        refuse(faults)

    def _backend_options(self) -> BuildOptions:
        from ...engines.build_options import BuildOptions

        return BuildOptions(
            workspace_bytes=None if self.workspace_mb is None else self.workspace_mb * 2**20,
            optimization_level=self.optimization_level,
            compute_capabilities=tuple(self.compute_capability or ()),
            hardware_compatible=self.hardware_compatible,
            version_compatible=self.version_compatible,
            report=self.report,
        )


def _build(arguments: BuildArguments) -> None:
    """Build an engine folder, all that a production machine needs, from a bundle.

    \b
    Example:
      edje build bundle --calibration-store photos.store --calibration-queries q.txt --out engine
      edje build bundle --backend tensorrt-rtx --precision fp16 --out engine
      edje build bundle --layers 4 --calibration-store photos.store \\
          --calibration-queries q.txt --out first
      edje build bundle --backend onnxruntime-cuda --precision fp16 --out engine
    """
    from ...engines.builder.build import build_engine

    options = arguments.engine_options()
    with arguments.samples() as samples, progress_steps("build") as progress:
        manifest = build_engine(
            arguments.bundle,
            arguments.out,
            backend=arguments.backend,
            precision=arguments.precision,
            calibration=samples,
            options=options,
            overwrite=arguments.overwrite,
            progress=progress,
            first_out=arguments.first_out,
        )
    if arguments.as_json:
        print_json({"engine": str(arguments.out), **manifest.to_json()})
    else:
        print_facts("built", {"engine": arguments.out, **_facts(manifest)})
        print_fidelity("fidelity", manifest.fidelity)


build = verb_of(BuildArguments, _build)


def _facts(manifest: EngineManifest) -> Mapping[str, Any]:
    """Return what a newcomer wants to see of a new engine."""
    from ...engines.builder.trial import trial_lines, why_chosen

    plan = manifest.precision_plan
    kept = [*plan.get("never_quantized", {}), *plan.get("kept", {})]
    trials = manifest.build_options.get("auto", [])
    chosen = why_chosen(manifest.backend, manifest.precision, trials)
    facts = {
        "runs on": f"{manifest.backend} {manifest.backend_version} {manifest.precision}",
        **({} if chosen is None else {"chosen": chosen}),
        **({"layers": _depth(plan["shallow"])} if "shallow" in plan else {}),
        "seconds": f"{manifest.build_seconds:.1f}",
    }
    if "quantized" in plan:
        facts["calibrated"] = f"{plan['method']}, on {plan['calibration_data']}"
        facts["kept in 16 bit"] = ", ".join(kept) or "nothing"
    if "pair" in manifest.build_options:
        facts["before it"] = _before(manifest.build_options["pair"])
    facts |= trial_lines(trials)
    return facts


def _before(pair: Mapping[str, Any]) -> str:
    """Say which engine to put before the one that was built, or that none pays."""
    alone, first = f"{pair['alone_pairs_per_s']:,.0f}", pair["first"]
    if first is None:
        return f"nothing: no first engine reaches {pair['wanted']} sooner than {alone} pairs/s"
    return (
        f"{first['backend']} {first['precision']}, in --first-out: about "
        f"{pair['pairs_per_s']:,.0f} instead of {alone} pairs/s to {pair['wanted']}"
    )


def _depth(shallow: Mapping[str, Any]) -> str:
    """Say how many layers a shallow engine has, and how its head does on queries left out."""
    left_out = shallow["left_out"]
    depths = ", ".join(
        f"top {k} whole in the best {recalls['1']:.0%}" for k, recalls in left_out["depths"].items()
    )
    seconds, correlation = shallow["seconds"]["fitting"], left_out["correlation"]
    head = f"head fitted in {seconds:.1f} s, correlation {correlation:.3f}"
    return f"{shallow['layers']} of {shallow['of']}; {head}; {depths}"


def _layers(text: str | None) -> int | str | None:
    if text is None or text == AUTO:
        return text
    try:
        return int(text)
    except ValueError as error:
        raise RequestError(
            f"--layers is {text!r}, expected a whole number or auto", hint="--layers 4"
        ) from error


def _whole_numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise RequestError(
            f"{option} is {text!r}, expected whole numbers with commas between", hint="16,32,64"
        ) from error


def print_fidelity(title: str, values: Mapping[str, Any]) -> None:
    """Write a manifest's `fidelity`: what was measured, and what was only emulated beside it."""
    from ...engines.fidelity import NOT_MEASURED, is_measured

    if is_measured(values):
        print_table(title, ("measure", "value", "what it says"), _fidelity_rows(values))
    else:
        note(f"fidelity: {NOT_MEASURED}; `edje verify` measures it where the engine runs")
    if "emulated" in values:
        rows = _fidelity_rows(values["emulated"])
        print_table(f"{title}, emulated", ("measure", "value", "what it says"), rows)


def _fidelity_rows(values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    share, score = "{:.2%}".format, "{:.3g}".format
    rows = [
        ("same first place", share(values["top_1"]), "queries whose best image is float32's"),
        ("same first ten", share(values["top_10"]), "of float32's ten best are among its ten"),
        ("Kendall tau", f"{values['kendall_tau']:.4f}", "order of all candidates: 1 is the same"),
        ("mean difference", score(values["mean_abs_diff"]), "of a pair's score (raw logit)"),
        ("99.9 % differ by", score(values["p999_abs_diff"]), "or less"),
        ("max difference", score(values["max_abs_diff"]), "of any pair"),
    ]
    for name, found in (values["recall"] or {}).items():
        exact = share(values["reference_recall"][name])
        says = f"of {values['num_targets']:,} targets found; float32 finds {exact}"
        rows.append((name, share(found), says))
    size = f"{values['num_queries']:,} queries, {values['num_pairs']:,} pairs"
    warning = "; made-up data shows rounding, not how a ranking fares" if values["random"] else ""
    return [
        *rows,
        ("scored", size, values["data"] + warning),
        ("reference", "float32", values["reference"]),
        ("ran on", "", values["measured_on"]),
    ]
