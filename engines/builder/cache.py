"""Engines by what they are made of: built once, by whoever comes first, and found again.

An entry is a plain engine folder, `<root>/<key>-<backend>-<precision>`. Delete any at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...arguments import Arguments, StrPath
from ...bundle import IMAGE_ENCODER, JOINT_ENCODER, TOKENIZER, BundleManifest
from ...errors import CheckpointError, EngineError
from ...files import LOCKS_HINT, lock_fault, open_lock, sha256_of, try_lock, wait_lock
from ..contract import Progress
from ..manifest import FORMAT_VERSION, EngineManifest
from ..registry import file_faults, require_builder
from ..samples import Samples
from ..scales import scales_of
from .build import build_one, shallow_graph
from .options import EngineOptions, EngineRequest

CACHE_VERSION = 3  # raised when the same request gives another engine
ROOT_VARIABLE = "EDJE_CACHE"

# The entry's name, out of the name of a lock, a half-built engine or one half removed.
_HIDDEN = re.compile(r"\.(?P<entry>[0-9a-f]{16}-[a-z-]+-[a-z0-9]+)\.")


def cached_engine(
    bundle: StrPath,
    root: StrPath | None = None,
    *,
    backend: str,
    precision: str,
    calibration: Samples | None = None,
    options: EngineOptions | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of the engine that `build_engine` would build, built only if need be.

    Any number of threads and processes may ask for the same engine at once: one builds, the
    others wait for it. A damaged entry is built again.

    Args:
        bundle: bundle folder.
        root: folder of the cache; None: $EDJE_CACHE, else `~/.cache/edje/engines`.
        backend, precision: as `build_engine`; not `auto`, whose choice no key foretells.
        calibration, options, progress: as `build_engine`.

    Raises:
        CheckpointError: `bundle` is no model bundle.
        EngineError: as `build_engine`, an option that no key can hold, or a root that cannot be
            written or locked.
        RequestError: arguments of another kind (all of them), before any work.
    """
    given = Arguments("cached_engine")
    request = EngineRequest.take(given, bundle, backend, precision, calibration, options)
    root = default_root() if root is None else given.path("root", root)
    given.callback("progress", progress)
    given.check()
    progress = progress or (lambda _: None)
    parts = key_parts(request)
    entry = root / entry_name(parts)
    if is_sound(entry, parts):
        return entry
    with _locked(entry, progress):
        _sweep(root, entry.name)
        if is_sound(entry, parts):  # built while this call waited
            return entry
        if entry.exists():
            progress(f"removing the damaged engine {entry}")
            shutil.rmtree(entry)
        with shallow_graph(request, progress) as shallow:
            build_one(request, entry, progress=progress, shallow=shallow)
        if not is_sound(entry, parts):
            shutil.rmtree(entry)
            raise EngineError(
                f"the bundle {bundle} changed while its engine was built; nothing was kept",
                hint="build again when the bundle is whole",
            )
    return entry


def default_root() -> Path:
    """Return the folder of the cache: $EDJE_CACHE, else `~/.cache/edje/engines`."""
    chosen = os.environ.get(ROOT_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "edje" / "engines"


def key_parts(request: EngineRequest) -> dict[str, Any]:
    """Return all that decides what an engine is, as plain JSON values.

    Raises:
        CheckpointError: the bundle is none, or lacks a file.
        EngineError: a request that `build_engine` refuses at once, or that no key can hold.
    """
    bundle, options = request.bundle, request.options
    manifest = BundleManifest.read(bundle)
    module = require_builder(request.backend, request.precision, options.backend_options)
    model = manifest.to_json()
    del model["provenance"]  # says how it was made, not what it is
    names = [JOINT_ENCODER, TOKENIZER, *([IMAGE_ENCODER] if options.image_encoder else [])]
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    profile = asdict(options.profile(manifest.text.max_wordpieces))
    given |= {**profile, "limits": options.limits_to_hold}
    return {
        "versions": {"cache": CACHE_VERSION, "manifest": FORMAT_VERSION, "edje": __version__},
        "bundle": model,
        "files": {name: _sha256(bundle, name) for name in names},
        "backend": request.backend,
        "backend_version": module.version(),
        "precision": request.precision,
        "device": module.device(request.precision, options.backend_options),
        "calibration": request.calibration and request.calibration.fingerprint,
        # A backend may offer others elsewhere, on a CPU of the same features.
        "scales": [way.key for way in scales_of(module, request.precision, manifest.sizes)],
        "options": {name: _plain(name, value) for name, value in given.items()},
    }


def entry_name(parts: Mapping[str, Any]) -> str:
    """Return the folder name of an engine from its `key_parts`."""
    text = json.dumps(parts, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    return f"{key[:16]}-{parts['backend']}-{parts['precision']}"


def _plain(name: str, value: Any) -> Any:
    """Return an option as plain JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(name, asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(name, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, inner) for inner in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise EngineError(f"{name} is {value!r}: no key of the engine cache can hold it")


def _sha256(bundle: Path, name: str) -> str:
    try:
        return sha256_of(bundle / name)
    except OSError as error:
        raise CheckpointError(
            f"the bundle {bundle} lacks {name} ({error.strerror})",
            hint="export it again (an image encoder needs `edje export ... --vision-model DIR`)",
        ) from error


def is_sound(entry: Path, parts: Mapping[str, Any]) -> bool:
    """Return whether `entry` holds, whole, the engine that `parts` asks for."""
    try:
        manifest = EngineManifest.read(entry)
    except (EngineError, OSError):
        return False
    asked = (parts["backend"], parts["precision"], parts["backend_version"])
    held = (manifest.backend, manifest.precision, manifest.backend_version)
    same = manifest.onnx_sha256 == parts["files"][JOINT_ENCODER]
    return asked == held and same and not file_faults(manifest, entry)


def _lock_path(root: Path, entry: str) -> Path:
    return root / f".{entry}.lock"


@contextmanager
def _locked(entry: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of an entry; its file stays, or two could hold two files of one name."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock(_lock_path(entry.parent, entry.name))
    except OSError as error:
        raise EngineError(
            f"cannot write the engine cache {entry.parent}: {error.strerror}",
            hint=f"set {ROOT_VARIABLE} to a folder that can be written",
        ) from error
    try:
        _take(descriptor, entry, progress)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, entry: Path, progress: Progress) -> None:
    """Take the lock of an entry, however long that takes."""
    try:
        owner = try_lock(descriptor)
        if owner is not None:
            progress(f"waiting for {owner}, which builds this engine")
            wait_lock(descriptor)
    except OSError as error:
        raise EngineError(
            lock_fault(_lock_path(entry.parent, entry.name), error),
            hint=f"set {ROOT_VARIABLE} to a folder on another disk; {LOCKS_HINT}",
        ) from error


def _sweep(root: Path, held: str) -> None:
    """Remove what killed builders left: hidden folders of entries that nobody builds now.

    The lock of the entry `held` is the caller's.
    """
    for path in root.iterdir():
        match = _HIDDEN.match(path.name)
        if match is None or not path.is_dir():
            continue
        descriptor = open_lock(_lock_path(root, match["entry"]))
        try:
            if match["entry"] == held or try_lock(descriptor) is None:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)
