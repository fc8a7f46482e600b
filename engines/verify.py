"""`edje verify`: how faithful a built engine is, measured here, on the user's own pairs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from ..arguments import Arguments, StrPath
from ..bundle import JOINT_ENCODER, TOKENIZER, BundleManifest
from ..errors import EngineError
from ..files import rewrite_file, sha256_of
from .contract import Progress
from .fidelity import Fidelity, measure_fidelity
from .manifest import MANIFEST, EngineManifest
from .registry import open_engine
from .samples import Samples, check_samples


def verify_engine(
    folder: StrPath,
    bundle: StrPath,
    samples: Samples | None = None,
    *,
    write: bool = False,
    progress: Progress | None = None,
) -> Fidelity:
    """Measure the engine at `folder` against the float32 graph of the bundle it was built from.

    Args:
        samples: what to score; None scores seeded random pairs, and the result says so.
        write: put the result into `engine.json`, whole or not at all; all else in it stays.
        progress: called with one short line now and then.

    Raises:
        CheckpointError: `bundle` is no model bundle.
        EngineError: no engine, one that cannot run here or was built from another bundle (all
            that differs is named), a failed run, or an `engine.json` that cannot be written.
        StoreError: damaged records of the samples' store.
        RequestError: arguments of another kind (all of them), before any work.
    """
    given = Arguments("verify_engine")
    folder, bundle = given.path("folder", folder), given.path("bundle", bundle)
    check_samples(given, "samples", samples)
    given.flag("write", write)
    given.callback("progress", progress)
    given.check()
    manifest = EngineManifest.read(folder)
    before = (folder / MANIFEST).read_bytes()
    check_bundle(manifest, folder, bundle)
    engine = open_engine(folder)
    try:
        fidelity = Fidelity(**measure_fidelity(engine, bundle, samples, progress))
    finally:
        engine.close()
    if write:
        write_fidelity(folder, fidelity, before)
    return fidelity


def check_bundle(manifest: EngineManifest, folder: Path, bundle: Path) -> None:
    """Check that `bundle` is what the engine at `folder` was built from.

    Raises:
        CheckpointError: `bundle` is no model bundle.
        EngineError: fingerprints, text rules or files differ (all named, both sides).
    """
    given, built_from = BundleManifest.read(bundle), manifest.bundle
    sides: list[tuple[str, Any, Any]] = [
        ("encoder fingerprint", built_from.fingerprint_encoder, given.fingerprint_encoder),
        ("scorer fingerprint", built_from.fingerprint_scorer, given.fingerprint_scorer),
        ("text rules", built_from.text, given.text),
        (f"SHA-256 of {JOINT_ENCODER}", manifest.onnx_sha256, _sha256(bundle / JOINT_ENCODER)),
        (f"SHA-256 of {TOKENIZER}", manifest.files.get(TOKENIZER), _sha256(bundle / TOKENIZER)),
    ]
    faults = [
        f"{name}: the engine's is {ours}, the bundle's is {theirs}"
        for name, ours, theirs in sides
        if ours != theirs
    ]
    if faults:
        raise EngineError(
            f"the engine {folder} was not built from the bundle {bundle}",
            faults=faults,
            hint=f"its bundle lay at {shlex.quote(manifest.bundle_path)}: pass that one, or build "
            "the engine again",
        )


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        return f"not readable ({error.strerror})"


def write_fidelity(folder: Path, fidelity: Fidelity, before: bytes) -> None:
    """Put `fidelity` into the `engine.json` of `folder`, whose content was `before`.

    What was emulated at the build stays beside it.

    Raises:
        EngineError: the file changed meanwhile, or cannot be written; it stays as it is.
    """
    values = json.loads(before)
    measured = fidelity.to_json()
    if "emulated" in values["fidelity"]:
        measured["emulated"] = values["fidelity"]["emulated"]
    content = json.dumps({**values, "fidelity": measured}, indent=2) + "\n"
    try:
        with rewrite_file(path := folder / MANIFEST) as file:
            file.write(content.encode())
            if path.read_bytes() != before:
                raise EngineError(
                    f"{path} changed while the engine was measured, nothing was written",
                    hint="run `edje verify` again",
                )
    except OSError as error:
        raise EngineError(
            f"cannot write {folder / MANIFEST}: {error.strerror or error}",
            hint="make the folder writable, or leave out --write",
        ) from error
