"""What a reranker runs on: arguments checked, parts opened, pipelines made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from ..arguments import Arguments, StrPath
from ..engines.contract import Engine, OpenOptions
from ..engines.manifest import EngineManifest
from ..errors import RequestError, StoreError
from ..kernels.device import NAMES, open_device
from ..kernels.device.contract import Device
from .pipeline import NUM_SLOTS, Pipeline
from .residency import Place, Residency, ResidencyOptions, decide
from .results import MARGIN, RECALL
from .source import tokens_for
from .store import TokenStore
from .streams import Streams
from .text import QueryTokenizer

if TYPE_CHECKING:
    from .hidden import HiddenPool


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where and how the engines of a reranker run.

    Attributes:
        device: the caller's; None is the host, made by the reranker.
        stream: the caller's own to compute on (see `Device.borrow`); None makes one.
        residency: where tokens shall be read from.
        graphs: let a GPU run batches of sizes that come again as CUDA graphs.
    """

    device: Device | None = None
    stream: object | None = None
    residency: ResidencyOptions = field(default_factory=ResidencyOptions)
    graphs: bool = True


def open_pipelines(
    engines: Sequence[Engine],
    store: TokenStore,
    device: Device,
    tokenizer: QueryTokenizer,
    runs: RunOptions,
) -> tuple[list[Pipeline], Residency, HiddenPool | None]:
    """Decide where tokens are read from, load what is to be held, make a pipeline an engine.

    Hidden states get what memory is left, where one engine can go on from another's.

    Args:
        engines: of one model, all reading tokens of one dtype.
        store: loaded into memory where that is decided.

    Raises:
        RequestError: a residency that cannot be granted.
        EngineError: not enough memory, or the device failed.
        StoreError: the store cannot be read, or not be loaded.
    """
    streams = Streams(device, borrowed=runs.stream)
    residency, plan = decide(
        runs.residency,
        engines[0],
        store,
        device,
        streams,
        queries=tokenizer(["a photo"]),
        num_slots=NUM_SLOTS * len(engines),
    )
    if residency.place == "host":
        store.load_into_memory()
    pool = None
    if plan is not None:
        checks_finite = any(engine.manifest.hides_nan for engine in engines)
        rows = store.live_rows()
        pool = plan.make_pool(device, rows, plan.capacity, checks_finite=checks_finite)
    hidden = None
    if len(engines) > 1:
        from .hidden import open_hidden_pool

        with device.current():
            hidden = open_hidden_pool(engines, device)
    pipelines = [
        Pipeline(
            engine,
            tokens_for(engine, store),
            device,
            streams=streams,
            pool=pool,
            graphs=runs.graphs,
        )
        for engine in engines
    ]
    if plan is not None and pool is not None:
        pipelines[0].load(plan.ahead)
        if plan.policy != "recent":
            pool.map.freeze()
    return pipelines, residency, hidden


@dataclass(frozen=True, slots=True)
class OpenArguments:
    """What `Reranker.open` was given; see there."""

    engine: StrPath
    store: StrPath | TokenStore
    rescore: StrPath | Sequence[StrPath] | None
    rescore_margin: float | None
    recall: float | None
    num_threads: int | None
    backend_settings: Mapping[str, str] | None
    device: str | Device | None
    stream: object | None
    residency: Place | ResidencyOptions | None
    graphs: bool

    def check(self) -> None:
        """Refuse what cannot be meant, all of it, before anything is opened."""
        given = Arguments("Reranker.open")
        given.path("engine", self.engine, "the folder of an engine")
        _check_store(given, self.store)
        for folder in self.rescoring:
            given.path("rescore", folder, "the folder of an engine, several, or None")
        if self.rescore_margin is not None:
            given.number("rescore_margin", self.rescore_margin, f"{MARGIN}; or None")
        if self.recall is not None:
            given.number("recall", self.recall, f"{RECALL}; or None")
        if self.num_threads is not None:
            given.whole("num_threads", self.num_threads, "1 or more, or None")
        given.settings("backend_settings", self.backend_settings or {})
        if not _names_a_device(self.device):
            given.refuse("device", self.device, f"a name ({NAMES}), an open device, or None")
        given.flag("graphs", self.graphs)
        try:
            self.runs(None)
        except RequestError as wrong:
            given.faults += wrong.faults
        given.check()

    @property
    def rescoring(self) -> tuple[StrPath, ...]:
        """The folders of the engines behind the first, in their order."""
        given = self.rescore
        if isinstance(given, list | tuple):
            return tuple(given)
        return () if given is None else (cast(StrPath, given),)

    # What was given by name is opened, and `undo` gets what closes it; the rest is the caller's.

    def open_store(self, undo: ExitStack) -> TokenStore:
        """Return the store, opened for reading."""
        if isinstance(self.store, TokenStore):
            return self.store
        return undo.enter_context(TokenStore.open(self.store))

    def open_device(self, undo: ExitStack) -> Device:
        """Return the device; None is what the engine was built for."""
        if self.device is not None and not isinstance(self.device, str):
            return self.device
        device = open_device(self.device, EngineManifest.read(self.engine).device.get("kind"))
        undo.callback(device.close)
        return device

    def open_engine(self, folder: StrPath, undo: ExitStack) -> Engine:
        """Open an engine on the current device: a GPU's engine belongs to one GPU."""
        from ..engines.registry import open_engine

        num_threads = None if self.num_threads is None else int(self.num_threads)
        engine = open_engine(folder, OpenOptions(num_threads, dict(self.backend_settings or {})))
        undo.callback(engine.close)
        return engine

    def runs(self, device: Device | None) -> RunOptions:
        """Return where and how the engines run; refuse a residency that cannot be meant."""
        residency = self.residency
        if not isinstance(residency, ResidencyOptions):
            residency = ResidencyOptions(residency)
        return RunOptions(device, self.stream, residency, self.graphs)


def _check_store(given: Arguments, store: object) -> None:
    if not isinstance(store, TokenStore):
        given.path("store", store, "the folder of a token store, or an open TokenStore")
        return
    try:
        len(store)
    except StoreError as closed:
        given.faults.append(f"store: {closed.message}, expected an open TokenStore or its folder")


def _names_a_device(device: object) -> bool:
    if isinstance(device, str):
        return bool(device)
    return device is None or hasattr(device, "shares_memory")
