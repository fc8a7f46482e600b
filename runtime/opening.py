"""What a reranker runs on, checked, then opened: store, device, engines, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..arguments import Arguments, StrPath
from ..engines.contract import Engine, OpenOptions
from ..engines.manifest import EngineManifest
from .cascade import MARGIN
from .device.open import NAMES, open_device
from .device.protocol import Device
from .residency.plan import Place, ResidencyOptions
from .store import TokenStore
from .store.store import Access
from .text import QueryTokenizer


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
    from ..engines.open import open_engine

    with device.current():
        engine = open_engine(folder, options)
    undo.callback(engine.close)
    return engine
