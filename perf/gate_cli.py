"""`edje bench compare` and `edje bench gate`: is it slower than before?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .harness import SCRATCH


def compare(
    base: Annotated[Path, typer.Argument(help="JSON of the base: ours or pytest-benchmark's.")],
    head: Annotated[Path, typer.Argument(help="JSON of what is to be judged.")],
    fail: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<FIELD:AMOUNT>", help="What it may be worse by; may be given more than once."
        ),
    ] = None,
    across_machines: Annotated[
        bool, typer.Option("--across-machines", help="Compare though the machines differ.")
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Let the head lack benchmarks of the base.")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="File for a page in Markdown.")] = None,
    junit: Annotated[Path | None, typer.Option(help="File for JUnit XML.")] = None,
) -> None:
    """Compare two result files; 1 where a limit is broken.

    Fields: throughput and ops (less is worse); min, p50, p90, p99, max, mean, median, stddev, iqr
    (amounts in %, s, ms or us); counters (each of them) and counters.NAME.

    \b
    Exit codes: 0 no regression, 1 one, or a missing benchmark, 2 cannot compare.
    Example:
      edje bench compare base.json head.json --fail throughput:5% --fail counters:0
    """
    from .compare import compare_files

    files = {"markdown_file": markdown, "junit_file": junit}
    code = compare_files(
        base,
        head,
        fail or (),
        across_machines=across_machines,
        allow_missing=allow_missing,
        **files,
    )
    raise typer.Exit(code)


def gate(
    base: Annotated[
        str | None, typer.Option(help="Git ref to compare with; default: origin/main or HEAD~1.")
    ] = None,
    stages: Annotated[str, typer.Option(help="Names with commas between; default: all.")] = "",
    limit: Annotated[float, typer.Option(help="Slowdown in % from which on a stage fails.")] = 5.0,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<[STAGE.]COUNTER=PERCENT>",
            help="What a counter may grow by; may be given more than once.",
        ),
    ] = None,
    engine: Annotated[
        Path | None, typer.Option(help="Engine folder; default: an engine that takes no time.")
    ] = None,
    candidates: Annotated[int, typer.Option(help="Images that a query ranks.")] = 256,
    unpinned: Annotated[
        bool, typer.Option("--unpinned", help="Use all cores; default: one core a launch.")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="File for a page in Markdown.")] = None,
    junit: Annotated[Path | None, typer.Option(help="File for JUnit XML.")] = None,
    name: Annotated[str, typer.Option(help="Of the JSON file.")] = "gate",
    out: Annotated[Path, typer.Option(help="Folder of the JSON.")] = SCRATCH,
) -> None:
    """Compare this checkout with a base commit; 1 if slower.

    \b
    Exit codes: 0 no regression, 1 a regression, 2 cannot compare.
    Example:
      edje bench gate --base origin/main --markdown gate.md --junit gate.xml
    """
    from .gate import GateOptions, gate_checkout

    options = GateOptions.of(
        stages=[one for one in stages.split(",") if one],
        limit=limit / 100,
        allowed=allow or (),
        engine=engine,
        candidates=candidates,
        pinned=not unpinned,
    )
    files = {"markdown_file": markdown, "junit_file": junit}
    raise typer.Exit(gate_checkout(base, options, name=name, out=out, **files))
