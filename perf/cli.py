"""`edje bench`: thin verbs, each importing what it needs when it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import EdjeError
from ..runtime.cli.options import Verbs, verb_of
from ..show import note, warn
from .gate_cli import compare, gate
from .harness import SCRATCH

app = typer.Typer(
    name="bench",
    cls=Verbs,
    help="Measure speed: every figure with its conditions, checked for right output in the run.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,  # edje's own completes all
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# `bench_<name>.py`, and what it compares.
OLDER = {
    "store": "Reading the token store against plain copies; a million ids.",
    "pipeline": "The pipeline's own cost, around an engine that takes no time.",
    "feed": "What store, pipeline and Python can feed an engine.",
    "end_to_end": "Reranker.rank against the bare library.",
    "precisions": "Precisions and backends against the Hugging Face scorer.",
    "cascade": "What a cascade saves on the demo, with the right top 10.",
    "depths": "What a shallow first stage saves, and what it loses.",
    "fidelity": "What precisions and stores do to a ranking.",
    "serve": "The server under load: capacity, overload, fairness.",
}

Engine = Annotated[
    Path | None, typer.Argument(help="Engine folder; default: the full-size random scorer.")
]
Store = Annotated[
    Path | None, typer.Option(help="Token store of the engine; default: random tokens.")
]
Candidates = Annotated[int, typer.Option(help="Images that a query ranks.")]
Seconds = Annotated[float, typer.Option(help="To measure each of them for.")]
Name = Annotated[str, typer.Option(help="Of the JSON file.")]
Out = Annotated[Path, typer.Option(help="Folder of the JSON; perf/results keeps it.")]


@dataclass(frozen=True, kw_only=True)
class StageArguments:
    """What stages are measured on, and for how long; each field is an option."""

    store: Store = None
    candidates: Candidates = 1000
    batch: Annotated[int | None, typer.Option(help="Pairs of a batch; default: the most.")] = None
    images: Annotated[
        int | None,
        typer.Option(help="Images of the random store; default: 2,048, or the candidates."),
    ] = None
    wordpieces: Annotated[int, typer.Option(help="Length of the query.")] = 13
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None
    backend: Annotated[str, typer.Option(help="Of the random scorer.")] = "openvino"
    precision: Annotated[
        str | None, typer.Option(help="Of the random scorer; default: the fastest here.")
    ] = None
    residency: Annotated[
        str | None, typer.Option(help="Tokens from disk (default), host, device or auto.")
    ] = None
    free: Annotated[
        bool, typer.Option("--free", help="An engine that takes no time: what is ours shows.")
    ] = False
    seconds: Seconds = 3.0
    roof: Annotated[bool, typer.Option(help="Measure the machine's roof in the same run.")] = True
    out: Out = SCRATCH

    def asked(self, engine: Path | None, stages: str, swept: str = "") -> dict[str, Any]:
        """Return what `run_stages` and `run_sweep` take, but for the setting that is swept.

        Raises:
            EdjeError: an engine is named, and how to make it as well.
        """
        if engine is not None and (self.free or self.precision is not None):
            raise EdjeError("--free and --precision are of the random scorer: name no engine")
        kept = ("store", "candidates", "batch", "images", "wordpieces", "threads", "residency")
        return {
            "seconds": self.seconds,
            "roof": self.roof,
            "made": {"backend": self.backend, "precision": self.precision, "free": self.free},
            "only": names_in(stages),
            **{name: getattr(self, name) for name in kept if name != swept},
        }


@dataclass(frozen=True, kw_only=True)
class RunArguments(StageArguments):
    """The words of `edje bench run`."""

    engine: Engine = None
    stages: Annotated[str, typer.Option(help="Names with commas between; empty: all.")] = ""
    query: Annotated[str | None, typer.Option(help="The query itself.")] = None
    name: Name = "stages"


@dataclass(frozen=True, kw_only=True)
class SweepArguments(StageArguments):
    """The words of `edje bench sweep`."""

    over: Annotated[
        str,
        typer.Argument(
            help="candidates, images, batch, wordpieces or threads, and values: "
            "candidates=100,1000,50000"
        ),
    ]
    engine: Engine = None
    stages: Annotated[str, typer.Option(help="Names with commas between.")] = "rank"
    least_rounds: Annotated[int, typer.Option(help="That long runs get at least.")] = 5
    name: Annotated[str | None, typer.Option(help="Of the files; default: what is swept.")] = None


@app.callback()
def _bench() -> None:
    """Measure speed: every figure with its conditions, checked for right output in the run."""


def _run(words: RunArguments) -> None:
    """Measure every stage of a ranking.

    In turns: a table, NAME.json and a chart in OUT.

    \b
    Example:
      edje bench run engine --store photos.store --candidates 1000
      edje bench run --free --stages tokenise,resolve,read,rank
    """
    from .charts import draw_stages
    from .measure import run_stages

    result = run_stages(words.engine, query=words.query, **words.asked(words.engine, words.stages))
    tell(result, words.name, words.out)
    note(f"drawn into {draw_stages(result, words.out / f'{words.name}.svg')}")


def _sweep(words: SweepArguments) -> None:
    """Measure stages under several values of one setting.

    In turns: a table, NAME.json and a chart in OUT.

    \b
    Example:
      edje bench sweep batch=1,8,32,128,256 --stages forward
      edje bench sweep images=10000,1000000,10000000 --free
    """
    from .charts import draw_sweep
    from .measure import run_sweep

    what, values = sweep_of(words.over)
    asked = words.asked(words.engine, words.stages, swept=what)
    result = run_sweep(words.engine, what, values, least_rounds=words.least_rounds, **asked)
    name = words.name or what
    tell(result, name, words.out)
    note(f"drawn into {draw_sweep(result, words.out / f'{name}.svg')}")


app.command()(verb_of(RunArguments, _run))
app.command()(verb_of(SweepArguments, _sweep))


@app.command()
def suite(
    parts: Annotated[
        str,
        typer.Option(help="peers, stages, candidates, images, top10, cold; empty: all."),
    ] = "",
    out: Out = SCRATCH,
) -> None:
    """Measure all that `make bench` shows (8 minutes).

    \b
    Exit codes: 0 as promised, 1 something falls short, 2 nothing measured.
    Example:
      edje bench suite --parts images,cold
    """
    from .suite import run_suite

    faults = run_suite(out, names_in(parts))
    for fault in faults:
        warn(f"falls short: {fault}")
    if faults:
        raise typer.Exit(1)


@app.command()
def cold(
    engine: Engine = None,
    runs: Annotated[int, typer.Option(help="Processes to start.")] = 5,
    name: Name = "cold",
    out: Out = SCRATCH,
) -> None:
    """Measure a cold `edje rerank`, from start to answer.

    \b
    Example:
      edje bench cold engine
    """
    from .cold import measure_cold

    tell(measure_cold(engine, runs), name, out)


@app.command()
def load(
    engine: Engine = None,
    store: Store = None,
    clients: Annotated[str, typer.Option(help="Numbers of clients at once.")] = "1,2,4,8,16",
    candidates: Candidates = 100,
    seconds: Seconds = 5.0,
    name: Name = "load",
    out: Out = SCRATCH,
) -> None:
    """Measure a server's latency under more and more clients.

    A table, NAME.json and a chart in OUT.

    \b
    Example:
      edje bench load engine --store photos.store --clients 1,4,16,64
    """
    from .charts import draw_load
    from .load import measure_load

    numbers = sweep_of(f"clients={clients}")[1]
    result = measure_load(
        engine, store=store, clients=numbers, candidates=candidates, seconds=seconds
    )
    tell(result, name, out)
    note(f"drawn into {draw_load(result, out / f'{name}.svg')}")


def names_in(text: str) -> list[str]:
    """Return what stands between commas."""
    return [one for one in text.split(",") if one]


def sweep_of(text: str) -> tuple[str, list[int]]:
    """Return name and values of `batch=1,8,32`.

    Raises:
        EdjeError: it is not of that form.
    """
    what, _, given = text.partition("=")
    values = names_in(given)
    if not values or not all(one.isdigit() and int(one) for one in values):
        raise EdjeError(f"got {text!r}, expected a name and whole numbers: batch=1,8,32")
    return what, [int(one) for one in values]


def tell(result: Mapping[str, Any], name: str, out: Path) -> None:
    """Write the table to stdout, the JSON to `out/name.json`."""
    from .measure import print_result
    from .report import write_result

    print_result(result)
    note(f"written to {write_result(name, result, out)}")


@app.command()
def peers(
    only: Annotated[str, typer.Option(help="Ids with commas between; default: all.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns of everybody at most.")] = 5,
    seconds: Annotated[
        float, typer.Option(help="Of each length; then no turn begins, but for the second.")
    ] = 120.0,
    candidates: Annotated[int, typer.Option(help="Images that `auto` ranks in a turn.")] = 1000,
    wordpieces: Annotated[str, typer.Option(help="Lengths of the queries.")] = "13,61",
    device: Annotated[str, typer.Option(help="`cuda`: what runs on an NVIDIA GPU.")] = "cpu",
    name: Annotated[str, typer.Option(help="Of the JSON file.")] = "peers",
    out: Out = SCRATCH,
) -> None:
    """Measure other ways to score the same pairs beside ours.

    Tables, and NAME.json in OUT; perf/PLAN.md says who is who.

    \b
    Exit codes: 0 as promised, 1 something falls short, 2 nothing measured.
    Example:
      edje bench peers --only auto,hf-official-fp32,ort-optimized --rounds 3
    """
    from .peers.run import run_peers

    lengths = [int(one) for one in wordpieces.split(",") if one]
    result = run_peers(
        name=name,
        out=out,
        only=[one for one in only.split(",") if one],
        num_rounds=rounds,
        seconds=seconds,
        num_candidates=candidates,
        wordpieces=lengths,
        device=device,
    )
    raise typer.Exit(1 if result["faults"] else 0)


app.command()(compare)
app.command()(gate)


def _add_older(name: str, about: str) -> None:
    """Add a benchmark with a command line of its own (`edje bench store --help`)."""

    def verb(ctx: typer.Context) -> None:
        module = import_module(f".bench_{name}", __package__)
        raise typer.Exit(module.main(ctx.args))

    as_it_comes = {"allow_extra_args": True, "ignore_unknown_options": True}
    settings: dict[str, Any] = {**as_it_comes, "help_option_names": []}
    app.command(name.replace("_", "-"), help=about, context_settings=settings)(verb)


for _name, _about in OLDER.items():
    _add_older(_name, _about)


@app.command()
def capacity(
    images: Annotated[float, typer.Option(help="In the store.", show_default="1e6")] = 1e6,
    queries: Annotated[float, typer.Option(help="A second.")] = 50.0,
    candidates: Annotated[int, typer.Option(help="Images that a query ranks.")] = 1000,
    dtype: Annotated[str, typer.Option(help="Of the tokens: float16 or int8.")] = "float16",
    slots: Annotated[int, typer.Option(help="Wordpieces, tokens and 3; of the H200.")] = 80,
    gpus: Annotated[int, typer.Option(help="Of a node.")] = 8,
    place: Annotated[
        str | None, typer.Option(help="Tokens on device, host or disk; default: each.")
    ] = None,
    cached: Annotated[float, typer.Option(help="Share of reads from the page cache.")] = 0.0,
    busy: Annotated[float, typer.Option(help="Share of its capacity to load a node to.")] = 0.7,
    stages: Annotated[
        Path | None, typer.Option(help="Result of `edje bench run`; default: the measured H200.")
    ] = None,
    compute_us: Annotated[float | None, typer.Option(help="Of a pair, instead.")] = None,
    launch_us: Annotated[float | None, typer.Option(help="Of a pair, instead.")] = None,
    read_us: Annotated[float | None, typer.Option(help="Of a pair, instead.")] = None,
    upload_us: Annotated[float | None, typer.Option(help="Of a pair, instead.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write perf/SCALE.md anew.")] = False,
) -> None:
    """Say what a load needs: nodes, GPUs, where tokens lie.

    \b
    Example:
      edje bench capacity --images 100e6 --queries 50 --candidates 1000
      edje bench capacity --stages .cache/perf/stages.json --gpus 1
    """
    from . import plan_capacity
    from .capacity import Traffic

    if write:
        plan_capacity.write_page()
        return
    traffic = Traffic(images, queries, candidates, dtype, cached, busy)
    traffic.check()
    given = {"compute": compute_us, "launch": launch_us, "read": read_us, "upload": upload_us}
    plan_capacity.run(traffic, gpus, place, plan_capacity.stages_for(stages, slots, dtype, given))
