"""What a reranker runs on: arguments checked, parts opened, pipelines made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from ..arguments import Arguments, StrPath, shown
from ..engines.contract import Engine, OpenOptions
from ..engines.manifest import EngineManifest
from ..kernels.device import NAMES, open_device
from ..kernels.device.contract import Device
from .cascade import MARGIN
from .measure import decide
from .pipeline import Pipeline
from .residency import Place, ResidencyOptions, make_pool
from .results import Residency
from .source import tokens_for
from .store import TokenStore
from .store.store import Access
from .streams import Lane
from .text import QueryTokenizer


def split_pairs(given: Arguments, pairs: object) -> tuple[list[str], list[str]]:
    """Return the queries and the ids of (query, id) pairs."""
    expected = "(query, id) tuples"
    found = [(pair, _halves(pair)) for pair in given.items("pairs", pairs, f"a list of {expected}")]
    wrong = [shown(pair) for pair, halves in found if halves is None]
    if wrong:
        given.faults.append(f"{len(wrong)} pairs are no {expected}: {', '.join(wrong[:20])}")
    halves = [both for _, both in found if both is not None]
    queries = given.strings("queries", [query for query, _ in halves])
    return queries, given.strings("ids", [image for _, image in halves])


def _halves(pair: object) -> tuple[object, object] | None:
    """Return the two parts of a pair, None for what is none: letters and sets have no order."""
    if isinstance(pair, str | bytes | Mapping | set | frozenset):
        return None
    try:
        parts = tuple(pair)  # type: ignore[arg-type, var-annotated]
    except TypeError:
        return None
    return (parts[0], parts[1]) if len(parts) == 2 else None


def deadline_of(
    given: Arguments, timeout_s: float | None, cancelled: Callable[[], bool] | None
) -> float | None:
    """Return when the time is up, as `time.monotonic` counts; check what else ends a request."""
    given.callback("cancelled", cancelled)
    if timeout_s is None:
        return None
    expected = "0 or more seconds, or None"
    return monotonic() + given.number("timeout_s", timeout_s, expected, finite=False)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where and how the engines of a reranker run.

    Attributes:
        device: the caller's; None is the host, made by the reranker.
        stream: the caller's own to compute on (see `Device.borrow`); None makes one.
        residency: where tokens shall be read from.
        graphs: let a GPU run batches of sizes that come again as CUDA graphs.
        reopen: opens the store again with its records in memory, should that be decided; the
            reranker then closes both. None: it must stay as it is.
    """

    device: Device | None = None
    stream: object | None = None
    residency: ResidencyOptions = field(default_factory=ResidencyOptions)
    graphs: bool = True
    reopen: Callable[[], TokenStore] | None = None


ON_HOST = RunOptions()


class OpenedPipelines(NamedTuple):
    """One pipeline an engine, and what they read from: `store` may be another than was given."""

    store: TokenStore
    pipelines: list[Pipeline]
    residency: Residency


def open_pipelines(
    engines: Sequence[Engine],
    store: TokenStore,
    device: Device,
    tokenizer: QueryTokenizer,
    runs: RunOptions,
) -> OpenedPipelines:
    """Decide where tokens are read from, load what is to be held, make the pipelines.

    Args:
        engines: of one model, all reading tokens of one dtype.

    Raises:
        RequestError: a wish that cannot be granted.
        EngineError: not enough memory, or the device failed.
        StoreError: the store cannot be read.
    """
    runs.residency.check()
    lane = Lane(device, borrowed=runs.stream)
    residency, plan = decide(
        runs.residency,
        engines[0],
        store,
        device,
        lane,
        queries=tokenizer(["a photo"]),
        num_pipelines=len(engines),
        may_load=runs.reopen is not None,
    )
    if residency.place == "host" and store.access != "resident" and runs.reopen is not None:
        store.close()
        store = runs.reopen()
    pool = None
    if plan is not None:
        checks_finite = any(engine.manifest.hides_nan for engine in engines)
        pool = make_pool(store, plan, device, checks_finite=checks_finite)
    pipelines = [
        Pipeline(
            engine, tokens_for(engine, store), device, lane=lane, pool=pool, graphs=runs.graphs
        )
        for engine in engines
    ]
    if plan is not None and pool is not None:
        pipelines[0].load(plan.ahead)
        if plan.policy != "recent":
            pool.map.freeze()
    return OpenedPipelines(store, pipelines, residency)


class Parts(NamedTuple):
    """Opened parts, in the order that closing needs; `reopen` loads the store into memory."""

    engine: Engine
    rescore: Engine | None
    tokenizer: QueryTokenizer
    store: TokenStore
    device: Device
    reopen: Callable[[], TokenStore] | None


def check_arguments(
    engine: StrPath,
    store: StrPath | TokenStore,
    rescore: StrPath | None,
    rescore_margin: float | None,
    num_threads: int | None,
    backend_settings: Mapping[str, str] | None,
    device: str | Device | None,
    residency: Place | ResidencyOptions | None,
    graphs: bool,
) -> tuple[OpenOptions, ResidencyOptions]:
    """Check everything that `Reranker.open` was given, before anything is opened; see there.

    Raises:
        RequestError: what cannot be meant, all of it.
    """
    given = Arguments("Reranker.open")
    given.path("engine", engine, "the folder of an engine")
    if not isinstance(store, TokenStore):
        given.path("store", store, "the folder of a token store, or an open TokenStore")
    if rescore is not None:
        given.path("rescore", rescore, "the folder of an engine, or None")
    if rescore_margin is not None:
        given.number("rescore_margin", rescore_margin, f"{MARGIN}; or None")
    if num_threads is not None:
        num_threads = given.whole("num_threads", num_threads, "1 or more, or None")
    settings = given.settings("backend_settings", backend_settings or {})
    if not (device is None or isinstance(device, str) or hasattr(device, "shares_memory")):
        given.refuse("device", device, f"a name ({NAMES}), an open device, or None")
    given.flag("graphs", graphs)
    wish = residency if isinstance(residency, ResidencyOptions) else ResidencyOptions(residency)
    given.faults += wish.faults()
    given.check()
    return OpenOptions(num_threads, settings), wish


def open_parts(
    engine: StrPath,
    rescore: StrPath | None,
    store: StrPath | TokenStore,
    device: str | Device | None,
    options: OpenOptions,
    residency: ResidencyOptions,
    undo: ExitStack,
) -> Parts:
    """Open everything that `Reranker.open` was given by name; see there.

    Args:
        undo: gets what closes it again; what came open stays the caller's.

    Raises:
        EngineError, StoreError, RequestError: as `Reranker.open`.
    """
    opened, reopen = _open_store(store, residency, undo)
    runs_on = _open_device(device, Path(engine), undo)
    model = _open_engine(Path(engine), options, runs_on, undo)
    precise = None if rescore is None else _open_engine(Path(rescore), options, runs_on, undo)
    tokenizer = QueryTokenizer.open(Path(engine), model.manifest.bundle.text)
    return Parts(model, precise, tokenizer, opened, runs_on, reopen)


def _open_store(
    store: StrPath | TokenStore, residency: ResidencyOptions, undo: ExitStack
) -> tuple[TokenStore, Callable[[], TokenStore] | None]:
    if isinstance(store, TokenStore):
        return store, None
    access: Access = "resident" if residency.place == "host" else "cached"
    opened = undo.enter_context(TokenStore.open(store, access=access))
    return opened, partial(TokenStore.open, store, access="resident")


def _open_device(device: str | Device | None, engine: Path, undo: ExitStack) -> Device:
    if device is not None and not isinstance(device, str):
        return device
    opened = open_device(device, EngineManifest.read(engine))
    undo.callback(opened.close)
    return opened


def _open_engine(folder: Path, options: OpenOptions, device: Device, undo: ExitStack) -> Engine:
    """Open an engine where its device is current: a GPU's engine belongs to one GPU."""
    from ..engines.registry import open_engine

    with device.current():
        engine = open_engine(folder, options)
    undo.callback(engine.close)
    return engine
