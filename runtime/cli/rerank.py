"""`edje rerank`: its options are many, so they live beside the other verbs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from ...arguments import Arguments, read_ids
from ...errors import StoppedError, counted, named
from ...show import escaped, note, print_json, print_table, warn
from .options import Json, OpeningArguments, as_text, verb_of

if TYPE_CHECKING:
    from ..reranker import Reranker
    from ..results import EngineLabel, Missing, RankResult

EXIT_NOT_WHOLE = 1
MAX_NOTES = 20  # faults that are told one a line
_HELD = ("device", "auto")  # places for which --resident-gb means something


@dataclass(frozen=True)
class RerankArguments(OpeningArguments):
    """The words of `edje rerank`: each field is an argument or an option of the command line."""

    engine: Annotated[Path, typer.Argument(help="Engine folder, written by `edje build`.")]
    store: Annotated[Path, typer.Option(help="Token store, written by `edje index`.")]
    query: Annotated[str, typer.Option(help="Plain text.")]
    candidates: Annotated[
        str | None, typer.Option(help="File with an id a line, or - for stdin; default: all ids.")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Hits to show; default: all.")] = None
    rescore_margin: Annotated[
        float | None,
        typer.Option(help="How far ENGINE may score below RESCORE; default: as measured."),
    ] = None
    recall: Annotated[
        float | None,
        typer.Option(help="Rescore a fixed share that held this recall; default: make sure."),
    ] = None
    resident_gb: Annotated[
        float | None, typer.Option(help="GPU memory for tokens, in 1e9 bytes; default: most.")
    ] = None
    missing: Annotated[
        str, typer.Option(help="Candidates that STORE lacks: error (default), or skip.")
    ] = "error"
    timeout: Annotated[float | None, typer.Option(help="Stop after this many seconds.")] = None
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a candidate was not ranked.")
    ] = False
    as_json: Json = False

    def check(self) -> None:
        """Refuse what cannot be meant, in the words of the command line, before anything loads."""
        from ..results import MARGIN, RECALL, Missing

        given = Arguments("edje rerank")
        self._check_folders(given)
        if self.top_k is not None:
            given.whole("--top-k", self.top_k, "1 or more")
        if self.rescore_margin is not None:
            given.number("--rescore-margin", self.rescore_margin, MARGIN)
            if not self.rescore:
                given.faults.append("--rescore-margin: only with --rescore, the precise engine")
        if self.recall is not None:
            if not 0 < self.recall <= 1:
                given.refuse("--recall", self.recall, RECALL)
            if not self.rescore:
                given.faults.append("--recall: only with --rescore, the precise engine")
        self.check_opening(given)
        if self.resident_gb is not None:
            if not 1 <= self.resident_gb * 1e9 < inf:
                given.refuse("--resident-gb", self.resident_gb, "1e9 bytes, more than 0")
            if self.residency not in _HELD:
                given.faults.append("--resident-gb: only with --residency device or auto")
        given.choice("--missing", self.missing, get_args(Missing))
        if self.timeout is not None:
            given.number("--timeout", self.timeout, "0 or more seconds", finite=False)
        given.check()

    def open(self) -> Reranker:
        """Open the engines over the store."""
        from ..reranker import Reranker

        max_bytes = None if self.resident_gb is None else int(self.resident_gb * 1e9)
        return Reranker.open(
            self.engine,
            store=self.store,
            rescore_margin=self.rescore_margin,
            recall=self.recall,
            **self.opening(max_bytes),
        )

    def rank(
        self, reranker: Reranker, query: str, ids: list[str] | None
    ) -> tuple[RankResult, StoppedError | None]:
        """Return the ranking; of a request whose time was up what it got so far, and the stop."""
        missing = cast("Missing", self.missing)
        try:
            ranked = reranker.rank(query, ids, self.top_k, missing=missing, timeout_s=self.timeout)
        except StoppedError as stop:
            return stop.partial, stop
        return ranked, None

    def _check_folders(self, given: Arguments) -> None:
        from ...engines.manifest import MANIFEST
        from ..store.format import STORE_JSON

        if (self.engine / STORE_JSON).is_file() and (self.store / MANIFEST).is_file():
            given.faults.append(
                f"{self.engine} is a token store and {self.store} an engine, expected them the "
                f"other way round: edje rerank {self.store} --store {self.engine}"
            )


def _rerank(arguments: RerankArguments) -> None:
    """Rank images of a store for a query, best first.

    Exits with 1 if none could be scored, or if the time was up; what is known then is shown.

    \b
    Example:
      edje rerank engine --store photos.store --query "a dog in the snow" --top-k 10
    """

    arguments.check()
    query, source = as_text(arguments.query, "--query"), arguments.candidates
    ids = None if source is None else read_ids(source, what="candidates")
    began = perf_counter()
    with arguments.open() as reranker:
        opened = perf_counter()
        reranker.warm_up(query)
        warm = perf_counter()
        result, stop = arguments.rank(reranker, query, ids)
    seconds = {"open_s": opened - began, "warm_up_s": warm - opened}
    if arguments.as_json:
        told = {"query": query, "stopped": stop is not None, **result.to_json(), **seconds}
        print_json({**told, "residency": asdict(reranker.residency)})
    else:
        if arguments.residency is not None:
            place = reranker.residency
            note(f"tokens are read from {place.place}: {place.reason}")
        print_ranking(result, **seconds)
    _exit_unless_scored(result, stop, arguments)


rerank = verb_of(RerankArguments, _rerank)


def _exit_unless_scored(
    result: RankResult, stop: StoppedError | None, arguments: RerankArguments
) -> None:
    """Exit with 1 where nothing was scored, or not all of it and that was asked for."""
    failed, absent = len(result.errors), len(result.missing)
    rest = "the others were" if result.hits else "none was"
    if stop is not None:
        warn(f"--timeout {arguments.timeout:g}: {stop}; the ranking is of these alone")
    elif result.hits and not (arguments.strict and (failed or absent)):
        return
    elif failed:
        unscored = counted(failed, "candidate", "candidates")
        warn(f"{unscored} could not be scored, {rest}; `edje store verify` says more")
    elif absent:
        unknown = counted(absent, "candidate is", "candidates are")
        warn(f"{unknown} not in the store, {rest} scored")
    else:
        empty = f"{arguments.store} holds no image"
        if arguments.candidates is not None:
            empty = f"the list --candidates {arguments.candidates} is empty"
        warn(f"nothing was scored: {empty}")
    raise typer.Exit(EXIT_NOT_WHOLE)


def print_ranking(result: RankResult, *, open_s: float, warm_up_s: float) -> None:
    """Write the hits to stdout; what could not be ranked goes to stderr.

    Args:
        open_s, warm_up_s: seconds that were spent before the ranking.
    """
    rows = [(str(n), f"{hit.score:.4f}", escaped(hit.id)) for n, hit in enumerate(result, 1)]
    stages: list[str] = []
    engine, rescoring, total_ms = result.engine, result.rescoring, result.timings_ms.total
    ran = _engine(engine)
    if engine.tokens != "float16":
        ran += f" from {engine.tokens} tokens"
    while rescoring is not None:
        stages.insert(0, f", {rescoring.num_rescored} rescored on {_engine(rescoring.engine)}")
        rescoring = rescoring.before
    ran += "".join(stages)
    asked = f" of {result.num_asked:,}" if result.num_asked != result.num_scored else ""
    print_table(
        f"{result.num_scored:,}{asked} images scored in {total_ms:,.1f} ms "
        f"({result.num_scored / total_ms * 1e3:,.0f} pairs/s) on {ran}\n"
        f"before: opened in {open_s:.2f} s, warmed up in {warm_up_s:.2f} s",
        ("rank", "score", "id"),
        rows,
    )
    if result.truncated:
        note("the query was cut to the wordpieces that the model takes")
    if result.missing:
        names = named([fault.id for fault in result.missing])
        absent = counted(len(result.missing), "candidate is", "candidates are")
        note(f"{absent} not in the store: {names}")
    for fault in result.errors[:MAX_NOTES]:
        warn(f"{fault.id!r} was not ranked: {fault.reason}")
    if len(result.errors) > MAX_NOTES:
        warn(f"{len(result.errors) - MAX_NOTES:,} more were not ranked: --json names all")


def _engine(label: EngineLabel) -> str:
    """Name an engine: `openvino int8`, and its layers where it has not all."""
    layers = f", {label.layers} layers" if label.layers else ""
    return f"{label.backend} {label.precision}{layers}"
