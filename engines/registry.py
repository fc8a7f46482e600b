"""Backends by name: which this machine builds and runs, and why not the rest; engines by folder."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from ..bundle import IMAGE_ENCODER
from ..errors import EngineError
from ..files import sha256_of
from .build_options import BuildOptions, raise_option_faults, refused_options
from .contract import Backend, Engine, OpenOptions
from .manifest import PRECISIONS, EngineManifest, rebuild_command


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
        runs: every precision the backend knows; the value is None where this machine runs it,
            else why not.
        builds: as `runs`: whether this machine builds it, for itself or for another.
    """

    name: str
    version: str | None
    runs: Mapping[str, str | None]
    builds: Mapping[str, str | None]

    @property
    def usable(self) -> tuple[str, ...]:
        """Precisions that this machine runs."""
        return tuple(name for name, reason in self.runs.items() if reason is None)

    @property
    def buildable(self) -> tuple[str, ...]:
        """Precisions that this machine builds."""
        return tuple(name for name, reason in self.builds.items() if reason is None)


# In the order of tables and of what `auto` tries. A new backend is one line here.
REGISTRY: Mapping[str, BackendEntry] = {
    "openvino": BackendEntry(".openvino", "openvino", "cpu", ("fp32", "bf16", "int8")),
    "onnxruntime": BackendEntry(".onnxruntime", "onnxruntime", "cpu", ("fp32", "int8")),
    "native": BackendEntry(".native.backend", "cuda.core", "gpu", ("fp16", "bf16", "int8", "fp8")),
    "tensorrt": BackendEntry(".tensorrt.backend", "tensorrt", "tensorrt", PRECISIONS),
    "tensorrt-rtx": BackendEntry(".tensorrt.rtx", "tensorrt_rtx", "rtx", PRECISIONS),
    "onnxruntime-cuda": BackendEntry(
        ".onnxruntime_cuda", "onnxruntime", "gpu-onnxruntime", PRECISIONS
    ),
}


def load_backend(name: str) -> Backend:
    """Import a backend by its command-line name.

    Raises:
        EngineError: no such backend (with those this machine can run), or its library is missing.
    """
    entry = REGISTRY.get(name)
    if entry is None:
        raise EngineError(f"unknown backend {name!r}", hint=_what_works())
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
        raise EngineError(f"{name} cannot run {precision} here: {reason}", hint=_what_works())
    return backend


def require_builder(name: str, precision: str, options: BuildOptions) -> Backend:
    """Import the backend `name` and make sure that this machine builds `precision` with it.

    Raises:
        EngineError: an unknown backend or precision, one that cannot be built here, or options
            that cannot be (all of them) or that the backend has not.
    """
    raise_option_faults(options)
    backend = _with_precision(name, precision)
    reason = backend.why_not_build(precision, options)
    if reason is not None:
        wrong = refused_options(partial(backend.why_not_build, precision), options)
        hint = f"leave out or change {', '.join(wrong)}: see `edje build --help`"
        raise EngineError(
            f"{name} cannot build {precision} here: {reason}",
            hint=hint if wrong else _what_works(),
        )
    return backend


def _with_precision(name: str, precision: str) -> Backend:
    """Import a backend that knows `precision`."""
    backend = load_backend(name)
    known = REGISTRY[name].precisions
    if precision not in known:
        raise EngineError(
            f"the backend {name} has no precision {precision!r}, expected {' or '.join(known)}",
            hint=_what_works(),
        )
    return backend


def probe_backends(names: Iterable[str] = tuple(REGISTRY)) -> tuple[BackendStatus, ...]:
    """Return what this machine makes of every backend. Imports the libraries that are there."""
    return tuple(_probe(name, REGISTRY[name]) for name in names)


def _probe(name: str, entry: BackendEntry) -> BackendStatus:
    try:
        backend = load_backend(name)
    except EngineError as error:
        reason = dict.fromkeys(entry.precisions, f"{error.__cause__}: {error.hint}")
        return BackendStatus(name, None, reason, reason)
    runs = {precision: backend.why_not(precision) for precision in entry.precisions}
    builds = {precision: _why_not_build(backend, precision) for precision in entry.precisions}
    return BackendStatus(name, backend.version(), runs, builds)


def _why_not_build(backend: Backend, precision: str) -> str | None:
    """Return why this machine cannot build `precision`: the backend's reason, or no library."""
    from .manifest import QUANTIZED

    reason = backend.why_not_build(precision, BuildOptions())
    if reason is not None:
        return reason
    is_exported = precision not in QUANTIZED and backend.compute_type(precision) == "float32"
    if is_exported and backend.why_not(precision) is None:
        return None  # else the graph is read to be emulated
    missing = [name for name in ("onnx", "ml_dtypes") if find_spec(name) is None]
    return f"needs {', '.join(missing)}: pip install 'edje-runtime[build]'" if missing else None


def _what_works() -> str:
    """Say in one line what this machine can run, and what it can build for others."""
    statuses = probe_backends()
    runs = [f"{s.name} ({', '.join(s.usable)})" for s in statuses if s.usable]
    if not runs:
        return "this machine can run none; pip install 'edje-runtime[cpu]'"
    others = {s.name: [p for p in s.buildable if p not in s.usable] for s in statuses}
    builds = [f"{name} ({', '.join(names)})" for name, names in others.items() if names]
    more = f", and build {'; '.join(builds)}" if builds else ""
    return f"this machine can run {'; '.join(runs)}{more}; `edje doctor` says why not the rest"


def open_engine(folder: str | os.PathLike[str], options: OpenOptions | None = None) -> Engine:
    """Open the engine at `folder` with the backend and precision that it was built for.

    Raises:
        EngineError: no engine folder; a stale or foreign one (all that differs is named: format
            version, backend version, device, files; with the command that rebuilds it); or the
            backend cannot be loaded or refuses the options.
    """
    folder, options = Path(folder), options or OpenOptions()
    if options.num_threads is not None and options.num_threads < 1:
        raise EngineError(f"num_threads is {options.num_threads}, expected 1 or more")
    manifest = EngineManifest.read(folder)
    rebuild = "build it again: " + rebuild_command(manifest.to_json(), folder)
    backend = load_backend(manifest.backend)
    faults = [
        *version_faults(manifest, backend.version()),
        *backend.device_faults(manifest),
        *file_faults(manifest, folder),
    ]
    if faults:
        raise EngineError(f"the engine {folder} is stale", faults=faults, hint=rebuild)
    reason = backend.why_not(manifest.precision)
    if reason is not None:
        raise EngineError(
            f"the engine {folder} cannot run here: {manifest.backend} {manifest.precision}: "
            f"{reason}",
            hint="build another --precision; `edje doctor` lists what this machine runs",
        )
    return backend.load(folder, manifest, options)


def version_faults(manifest: EngineManifest, installed: str) -> list[str]:
    """Compare the backend that built the engine with the one installed."""
    if manifest.backend_version == installed:
        return []
    return [
        f"backend version: built with {manifest.backend} {manifest.backend_version}, "
        f"{installed} is installed"
    ]


def file_faults(
    manifest: EngineManifest, folder: Path, sha256: Callable[[Path], str] = sha256_of
) -> list[str]:
    """Compare the files with their hashes in the manifest.

    The image encoder is large and not opened here: it must only be there.
    """
    faults = []
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            digest = expected if name == IMAGE_ENCODER and path.is_file() else sha256(path)
        except OSError as error:
            faults.append(f"file {name}: cannot be read ({error.strerror})")
            continue
        if digest != expected:
            faults.append(f"file hash: {name} is {digest[:12]}…, engine.json says {expected[:12]}…")
    return faults


def by_reason(verdicts: Iterable[tuple[str, str | None]]) -> dict[str, list[str]]:
    """Gather the precisions of each reason, each once; those without a reason are left out."""
    precisions: dict[str, list[str]] = {}
    for precision, reason in verdicts:
        if reason is not None and precision not in precisions.setdefault(reason, []):
            precisions[reason].append(precision)
    return precisions
