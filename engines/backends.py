"""Backends by name: which this machine can run, in which precision, and why not the rest."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from ..errors import EngineError
from .contract import Backend, BuildOptions
from .manifest import PRECISIONS


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """One line of the registry: the module, the library it wraps, and what it can give."""

    module: str
    library: str
    extra: str
    precisions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """What this machine makes of a backend.

    Attributes:
        name: its command-line name.
        version: the installed library's version, None where it cannot be imported.
        precisions: every precision the backend knows; the value is None where this machine runs
            it, else why not.
    """

    name: str
    version: str | None
    precisions: Mapping[str, str | None]

    @property
    def usable(self) -> tuple[str, ...]:
        """Precisions that this machine runs."""
        return tuple(name for name, reason in self.precisions.items() if reason is None)


REGISTRY: Mapping[str, BackendEntry] = {
    "openvino": BackendEntry(".ov", "openvino", "cpu", ("fp32", "bf16", "int8")),
    "onnxruntime": BackendEntry(".ort", "onnxruntime", "cpu", ("fp32", "int8")),
    "tensorrt": BackendEntry(".tensorrt", "tensorrt", "gpu", PRECISIONS),
    "tensorrt-rtx": BackendEntry(".tensorrt_rtx", "tensorrt_rtx", "rtx", PRECISIONS),
}


def load_backend(name: str) -> Backend:
    """Import a backend by its command-line name.

    Raises:
        EngineError: no such backend (with those this machine can run), or its library is missing.
    """
    entry = REGISTRY.get(name)
    if entry is None:
        raise EngineError(f"unknown backend {name!r}", hint=_what_runs())
    try:
        return cast(Backend, importlib.import_module(entry.module, __package__))
    except ImportError as error:
        raise EngineError(
            f"the backend {name} cannot be loaded: {error}",
            hint=f"pip install 'edje-runtime[{entry.extra}]'",
        ) from error


def require_backend(name: str, precision: str) -> Backend:
    """Import the backend `name` and make sure that this machine runs `precision` with it.

    Raises:
        EngineError: an unknown backend or precision, or one that this machine cannot run; the
            hint lists those that it can.
    """
    backend = _with_precision(name, precision)
    reason = backend.why_not(precision)
    if reason is not None:
        raise EngineError(f"{name} cannot run {precision} here: {reason}", hint=_what_runs())
    return backend


def require_builder(name: str, precision: str, options: BuildOptions) -> Backend:
    """Import the backend `name` and make sure that this machine builds `precision` with it.

    Raises:
        EngineError: an unknown backend or precision, or one that cannot be built here.
    """
    backend = _with_precision(name, precision)
    reason = backend.why_not_build(precision, options)
    if reason is not None:
        raise EngineError(f"{name} cannot build {precision} here: {reason}", hint=_what_runs())
    return backend


def _with_precision(name: str, precision: str) -> Backend:
    """Import a backend that knows `precision`."""
    backend = load_backend(name)
    known = REGISTRY[name].precisions
    if precision not in known:
        raise EngineError(
            f"the backend {name} has no precision {precision!r}, expected {' or '.join(known)}",
            hint=_what_runs(),
        )
    return backend


def probe_backends(names: Iterable[str] = tuple(REGISTRY)) -> tuple[BackendStatus, ...]:
    """Return what this machine makes of every backend. Imports the libraries that are there."""
    return tuple(_probe(name, REGISTRY[name]) for name in names)


def _probe(name: str, entry: BackendEntry) -> BackendStatus:
    try:
        backend = load_backend(name)
    except EngineError as error:
        reason = f"{error.message} ({error.hint})"
        return BackendStatus(name, None, dict.fromkeys(entry.precisions, reason))
    precisions = {precision: backend.why_not(precision) for precision in entry.precisions}
    return BackendStatus(name, backend.version(), precisions)


def _what_runs() -> str:
    """Say in one line what this machine can run."""
    usable = [f"{s.name} ({', '.join(s.usable)})" for s in probe_backends() if s.usable]
    if not usable:
        return "this machine can run none; pip install 'edje-runtime[cpu]'"
    return f"this machine can run {'; '.join(usable)}; `edje doctor` says why not the rest"
