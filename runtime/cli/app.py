"""The command line: one verb a step. Heavy layers are imported by the verb that needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ... import __version__
from ...errors import EdjeError
from ...show import be_quiet, print_json, print_table, progress_steps, warn
from .build import build, print_fidelity
from .index import IndexCommand, index
from .options import (
    EXIT_NO_READER,
    Json,
    Overwrite,
    Verbs,
    finish_output,
    require,
    start_output,
)
from .rerank import rerank
from .route import route
from .serve import serve
from .store import store_app

if TYPE_CHECKING:
    from ...bundle import BundleManifest

EXIT_BROKEN_LIMITS = 1
EXIT_BAD_INPUT = 2
# Of the floor above this one, and only in a checkout: known by its name alone.
BENCHMARKS = "edje.perf.cli"
EXIT_CODES = f"""\b
Exit codes:
  0    done
  1    a limit that does not hold, damage that stays, or work that gave nothing
  {EXIT_BAD_INPUT}    wrong usage or input: one clear sentence on stderr
  130  interrupted (Ctrl-C)
  {EXIT_NO_READER}  the reader of the output went away (`| head`)
"""

app = typer.Typer(
    name="edje",
    cls=Verbs,
    help="Score image-text pairs with trained EDJE models, as fast as the hardware can.",
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(store_app, name="store")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code, one of `EXIT_CODES`."""
    start_output()
    code = _exit_code(lambda: app(args=argv, prog_name="edje"))
    return _exit_code(finish_output) or code


def _exit_code(run: Callable[[], object]) -> int:
    """Run something; say what it failed of and return the exit code."""
    try:
        run()
    except EdjeError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or 'the system'}: {error.strerror or error}")
    except SystemExit as end:  # how typer ends every run
        return end.code if isinstance(end.code, int) else 0
    return 0


def _fail(message: str) -> int:
    print(f"edje: {message}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"edje-runtime {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            *("--quiet", "-q"),
            callback=be_quiet,
            expose_value=False,
            help="No progress, no notes: only results and errors.",
        ),
    ] = False,
) -> None:
    """Score image-text pairs with trained EDJE models, as fast as the hardware can."""


@app.command()
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(help="Official EDJE checkpoint (.pth), or OWNER/NAME[@REVISION][:FILE]."),
    ],
    language_model: Annotated[
        str, typer.Option(help="Hugging Face folder of the text model, or OWNER/NAME[@REVISION].")
    ],
    out: Annotated[Path, typer.Option(help="Bundle folder to write.")],
    vision_model: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face folder of the vision model, or OWNER/NAME[@REVISION]; without it "
            "the bundle indexes no images."
        ),
    ] = None,
    text_normalization: Annotated[
        str, typer.Option(help="openclip (as the official datasets) or none.")
    ] = "openclip",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Export a trained checkpoint to a model bundle (ONNX graphs, tokenizer, edje.json).

    What is no path here is looked up on the Hugging Face Hub, with that library's settings
    (HF_TOKEN, HF_HUB_CACHE, HF_HUB_OFFLINE).

    \b
    Example:
      edje export checkpoint_16.pth --language-model microsoft/MiniLM-L12-H384-uncased \\
          --vision-model google/siglip2-large-patch16-384 --out bundle
    """
    require("export", "torch", "transformers", "onnx")
    from ...bundle import read_parity
    from ...export.export import export_bundle

    with progress_steps("export") as progress:
        manifest = export_bundle(
            checkpoint,
            language_model,
            out,
            vision_model=vision_model,
            text_normalization=text_normalization,
            overwrite=overwrite,
            progress=progress,
        )
    parity = read_parity(out)
    if as_json:
        print_json({"bundle": str(out), **manifest.to_json(), "parity": parity})
    else:
        _print_exported(str(out), manifest, parity)


def _print_exported(out: str, manifest: BundleManifest, parity: Mapping[str, Any]) -> None:
    """Write what a bundle holds, and how far its graphs are from PyTorch."""
    print_table("exported", ("", ""), [("bundle", out), *_bundle_rows(manifest)])
    rows = [
        (graph, f"{found['max_abs_difference']:.1e}", f"{found['limit']:.1e}", _outputs(found))
        for graph, found in parity.items()
    ]
    runtime = next((found["runtime"] for found in parity.values()), "")
    print_table(
        f"parity: the same inputs through PyTorch and through {runtime}",
        ("graph", "largest difference", "allowed", "of outputs"),
        rows,
    )


def _bundle_rows(manifest: BundleManifest) -> list[tuple[str, str]]:
    sizes, text, image = manifest.sizes, manifest.text, manifest.image
    token_bytes = 2 * sizes.num_tokens * sizes.hidden
    images = "none: the bundle scores but does not index (no --vision-model was given)"
    if image is not None:
        images = f"{image.size} x {image.size} pixels, {sizes.num_features} features"
    dropped = manifest.provenance.get("dropped_from_keys", {})
    wrappers = "; ".join(f"{part} dropped from {count:,} keys" for part, count in dropped.items())
    rows = [
        (
            "queries",
            f"{text.normalization} normalization, at most {text.max_wordpieces} wordpieces",
        ),
        ("images", images),
        ("visual tokens", f"{sizes.num_tokens} x {sizes.hidden}: {token_bytes:,} bytes an image"),
        (
            "joint encoder",
            f"{sizes.num_layers} layers, {sizes.num_heads} heads, width {sizes.hidden}, "
            f"intermediate {sizes.intermediate}, vocabulary {sizes.vocab_size:,}",
        ),
        *_origins(manifest.provenance),
        ("encoder", f"fingerprint {manifest.fingerprint_encoder}"),
        ("scorer", f"fingerprint {manifest.fingerprint_scorer}"),
    ]
    return [*rows, ("checkpoint keys", wrappers)] if wrappers else rows


def _origins(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each input that came from the Hugging Face Hub, with its commit."""
    for name, origin in provenance.get("sources", {}).items():
        if origin and "repository" in origin:
            file = f"{origin['file']} in " if "file" in origin else ""
            yield name.replace("_", " "), f"{file}{origin['repository']} at {origin['commit']}"


def _outputs(found: Mapping[str, Any]) -> str:
    return f"up to {found['max_abs_output']:.3g}, {found['output_dtype']}"


app.command()(build)
app.command(cls=IndexCommand)(index)
app.command()(rerank)
app.command()(serve)
app.command()(route)


@app.command()
def verify(
    engine: Annotated[Path, typer.Argument(help="Engine folder, written by `edje build`.")],
    bundle: Annotated[Path, typer.Option(help="The bundle it was built from.")],
    store: Annotated[
        Path | None, typer.Option(help="Token store to score; default: random pairs.")
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(help="A line `query` or `query<TAB>target id`; or .jsonl with candidates."),
    ] = None,
    num_candidates: Annotated[
        int, typer.Option(help="Images drawn for a query that brings none.")
    ] = 50,
    max_queries: Annotated[int | None, typer.Option(help="Draw so many; default: all.")] = None,
    min_kendall_tau: Annotated[
        float | None, typer.Option(help="Exit with 1 below this rank agreement.")
    ] = None,
    max_top1_change: Annotated[
        float | None, typer.Option(help="Exit with 1 if more first places change (a share).")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the result in engine.json.")] = False,
    as_json: Json = False,
) -> None:
    """Measure how faithful an engine's scores and rankings are to the bundle in float32.

    \b
    Example:
      edje verify engine --bundle bundle --store photos.store --queries captions.tsv --write
    """
    from ...engines.fidelity import FidelityLimits
    from ...engines.verify import verify_engine
    from ..queries import open_samples

    limits = FidelityLimits(min_kendall_tau, max_top1_change)
    drawn = {"num_candidates": num_candidates, "max_queries": max_queries}
    with open_samples(store, bundle, queries, **drawn) as samples, progress_steps("verify") as step:
        fidelity = verify_engine(engine, bundle, samples, write=write, progress=step)
    broken = limits.broken_by(fidelity)
    if as_json:
        print_json({"engine": str(engine), **fidelity.to_json(), "broken_limits": broken})
    else:
        print_fidelity(f"{engine} against its bundle in float32", fidelity.to_json())
    if broken:
        warn(f"{engine} breaks its limits: {'; '.join(broken)}")
        raise typer.Exit(EXIT_BROKEN_LIMITS)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what this machine can run, and why not the rest.

    \b
    Example:
      edje doctor --json
    """
    from .doctor import examine, print_diagnosis

    diagnosis = examine()
    if as_json:
        print_json(diagnosis.to_json())
    else:
        print_diagnosis(diagnosis)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write the demo to.")] = Path("demo-out"),
    num_queries: Annotated[
        int | None, typer.Option(help="Test queries, a multiple of 4 up to 1024, the default.")
    ] = None,
) -> None:
    """Walk the whole way on synthetic scenes: render, export, build, index, rerank, compare.

    \b
    Example:
      edje demo --out demo-out
    """
    require("export", "torch", "transformers", "onnx")
    require("index", "PIL")
    from ...demo.guide import NUM_QUERIES, run_demo

    run_demo(out, num_queries=NUM_QUERIES if num_queries is None else num_queries)


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def bench(words: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Measure speed on this machine (from a checkout; `edje bench --help` lists the verbs)."""
    try:
        verbs = import_module(BENCHMARKS)
    except ModuleNotFoundError as missing:
        if missing.name not in ("edje.perf", BENCHMARKS):
            raise
        raise EdjeError(
            "benchmarks come with a checkout of the repository, this is an installed package",
            hint="git clone the repository, then `make bench` there",
        ) from missing
    verbs.app(args=words or [], prog_name="edje bench")
