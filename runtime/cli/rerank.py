"""`edje rerank`: its options are many, so they live beside the other verbs."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ...errors import RequestError
from .options import Json, as_text

if TYPE_CHECKING:
    from ..residency import Place
    from ..results import Missing, RankResult

EXIT_NOT_WHOLE = 1

EngineFolder = Annotated[Path, typer.Argument(help="Engine folder, written by `edje build`.")]
Store = Annotated[Path, typer.Option(help="Token store, written by `edje index`.")]
Query = Annotated[str, typer.Option(help="Plain text.")]
CandidatesFile = Annotated[
    str | None, typer.Option(help="File with an id a line, or - for stdin; default: all ids.")
]
TopK = Annotated[int | None, typer.Option(help="Hits to show; default: all.")]
Rescore = Annotated[Path | None, typer.Option(help="Precise engine: the top K becomes its own.")]
RescoreMargin = Annotated[
    float | None,
    typer.Option(help="How far ENGINE may score below RESCORE; default: as measured."),
]
NumThreads = Annotated[int | None, typer.Option(help="CPU threads of the engine.")]
DeviceName = Annotated[
    str | None, typer.Option(help="host, cuda_core (:1 for the next GPU) or pycuda.")
]
PlaceName = Annotated[
    str | None, typer.Option(help="Read tokens from disk (default), host, device or auto.")
]
ResidentGb = Annotated[
    float | None, typer.Option(help="GPU memory for tokens, in 1e9 bytes; default: most.")
]
MissingIds = Annotated[
    str, typer.Option(help="Candidates that STORE lacks: error (default), or skip.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Exit with 1 if a candidate was not ranked.")
]
Timeout = Annotated[float | None, typer.Option(help="Give up after this many seconds.")]


def rerank(
    engine: EngineFolder,
    store: Store,
    query: Query,
    candidates: CandidatesFile = None,
    top_k: TopK = None,
    rescore: Rescore = None,
    rescore_margin: RescoreMargin = None,
    num_threads: NumThreads = None,
    device: DeviceName = None,
    residency: PlaceName = None,
    resident_gb: ResidentGb = None,
    missing: MissingIds = "error",
    timeout: Timeout = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Rank images of a store for a query, best first. Exits with 1 if none could be scored.

    \b
    Example:
      edje rerank engine --store photos.store --query "a dog in the snow" --top-k 10
    """
    from ...notes import note
    from ...show import print_json
    from ..queries import read_ids
    from ..reranker import Reranker
    from ..residency import ResidencyOptions
    from .tables import print_ranking

    query = as_text(query, "--query")
    ids = None if candidates is None else read_ids(candidates, what="candidates")
    began = perf_counter()
    with Reranker.open(
        engine,
        store=store,
        rescore=rescore,
        rescore_margin=rescore_margin,
        num_threads=num_threads,
        device=device,
        # What place and missing may be is checked where they are used.
        residency=ResidencyOptions(cast("Place | None", residency), max_bytes=_bytes(resident_gb)),
    ) as reranker:
        opened = perf_counter()
        reranker.warm_up(query)
        warm = perf_counter()
        result = reranker.rank(
            query, ids, top_k, missing=cast("Missing", missing), timeout_s=timeout
        )
    seconds = {"open_s": opened - began, "warm_up_s": warm - opened}
    if as_json:
        place = asdict(reranker.residency)
        print_json({"query": query, **result.to_json(), **seconds, "residency": place})
    else:
        if residency is not None:
            note(f"tokens are read from {reranker.residency.place}: {reranker.residency.reason}")
        print_ranking(result, **seconds)
    _exit_unless_scored(result, strict)


def _exit_unless_scored(result: RankResult, strict: bool) -> None:
    from ...notes import warn

    failed = len(result.errors)
    if failed and (strict or not result.hits):
        rest = "the others were" if result.hits else "none was"
        warn(f"{failed:,} candidates could not be scored, {rest}; `edje store verify` says more")
        raise typer.Exit(EXIT_NOT_WHOLE)


def _bytes(gigabytes: float | None) -> int | None:
    if gigabytes is None:
        return None
    if not isfinite(gigabytes):
        raise RequestError(f"--resident-gb is {gigabytes}, expected a number of 1e9 bytes")
    return int(gigabytes * 1e9)
