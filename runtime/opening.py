"""What a reranker runs on, opened from folders and names: store, device, engines, tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..engines.contract import Engine, OpenOptions
from ..engines.manifest import EngineManifest
from .device.open import open_device
from .device.protocol import Device
from .residency.plan import ResidencyOptions
from .store import TokenStore
from .store.store import Access
from .text import QueryTokenizer

StrPath = str | os.PathLike[str]


class Parts(NamedTuple):
    """Opened parts, in the order that closing needs; `reopen` loads the store into memory."""

    engine: Engine
    rescore: Engine | None
    tokenizer: QueryTokenizer
    store: TokenStore
    device: Device
    reopen: Callable[[], TokenStore] | None


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
    residency.check()
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
