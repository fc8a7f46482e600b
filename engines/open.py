"""Open an engine folder: the manifest first, and a stale one is refused with the reasons."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..bundle import IMAGE_ENCODER
from ..errors import EngineError
from ..files import sha256_of
from .backends import load_backend
from .contract import Engine, OpenOptions
from .manifest import EngineManifest, rebuild_command


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
            found = expected if name == IMAGE_ENCODER and path.is_file() else sha256(path)
        except OSError as error:
            faults.append(f"file {name}: cannot be read ({error.strerror})")
            continue
        if found != expected:
            faults.append(f"file hash: {name} is {found[:12]}…, engine.json says {expected[:12]}…")
    return faults
