"""`edje bench`: thin verbs, each importing what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..runtime.cli.options import Verbs
from .harness import SCRATCH

app = typer.Typer(
    name="bench",
    cls=Verbs,
    help="Measure speed: every figure with its conditions, checked for right output in the run.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Out = Annotated[Path, typer.Option(help="Folder of the JSON; perf/results keeps it.")]


@app.callback()
def _bench() -> None:
    """Measure speed: every figure with its conditions, checked for right output in the run."""


@app.command()
def run(
    engine: Annotated[
        Path | None, typer.Argument(help="Engine folder; default: the full-size random scorer.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Token store of the engine; default: random tokens.")
    ] = None,
    stages: Annotated[str, typer.Option(help="Names with commas between; default: all.")] = "",
    candidates: Annotated[int, typer.Option(help="Images that a query ranks.")] = 1000,
    batch: Annotated[
        int | None, typer.Option(help="Pairs of a batch; default: as the engine takes.")
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Images of the random store; default: the candidates.")
    ] = None,
    wordpieces: Annotated[int, typer.Option(help="Length of the query.")] = 13,
    query: Annotated[str | None, typer.Option(help="The query itself.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of the random scorer; default: the fastest here.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Of the random scorer.")] = "openvino",
    residency: Annotated[
        str | None, typer.Option(help="Tokens from disk (default), host, device or auto.")
    ] = None,
    free: Annotated[
        bool, typer.Option("--free", help="An engine that takes no time: what is ours shows.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="To measure each stage for.")] = 3.0,
    name: Annotated[str, typer.Option(help="Of the JSON file.")] = "stages",
    out: Out = SCRATCH,
) -> None:
    """Measure every stage of a ranking, in turns: a table, and NAME.json in OUT.

    \b
    Example:
      edje bench run engine --store photos.store --candidates 1000
      edje bench run --free --stages tokenise,resolve,read,rank
    """
    from .measure import run_stages

    run_stages(
        engine,
        seconds=seconds,
        name=name,
        out=out,
        candidates=candidates,
        batch=batch,
        images=images,
        only=[one for one in stages.split(",") if one],
        store=store,
        query=query,
        wordpieces=wordpieces,
        threads=threads,
        free=free,
        backend=backend,
        precision=precision,
        residency=residency,
    )
