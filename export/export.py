"""`edje export`: an official checkpoint and its Hugging Face folders -> a model bundle.

Importing this module loads no heavy library; the call does.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

from .. import bundle
from ..arguments import Arguments, StrPath
from ..bundle import BundleManifest
from ..errors import CheckpointError, EdjeError
from ..files import publish_folder
from .sources import Progress, locate

LIBRARIES = ("torch", "transformers", "onnx")


def export_bundle(
    checkpoint: StrPath,
    language_model: StrPath,
    out: StrPath,
    *,
    vision_model: StrPath | None = None,
    text_normalization: str = "openclip",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BundleManifest:
    """Write the model bundle of a trained checkpoint into the folder `out`.

    Each input is a path, or else a name on the Hugging Face Hub, `owner/name` or
    `owner/name@revision`: what is needed of it is fetched into that library's cache.

    Args:
        checkpoint: the file that the official training saved; on the Hub `owner/name:file`,
            without `:file` where the repository holds one checkpoint.
        language_model: Hugging Face folder of the BERT model (config and tokenizer).
        vision_model: Hugging Face folder of the SigLIP model (config and image processor);
            without it the bundle has no `image_encoder.onnx` and cannot index images.
        text_normalization: `openclip` (as the model was trained) or `none`.
        progress: called with the name of each step as it starts, and with the bytes that were
            fetched so far.

    Returns: the manifest, as written to `edje.json`.

    Raises:
        CheckpointError: an input is not found or cannot be used, or a graph differs from
            PyTorch. Nothing is written to `out` then.
        EdjeError: `out` holds something (with `overwrite`: no bundle), or cannot be written; or
            a library is missing.
        RequestError: arguments of another kind (all of them), before any work.
    """
    given = Arguments("export_bundle")
    given.path("checkpoint", checkpoint)
    given.path("language_model", language_model)
    if vision_model is not None:
        given.path("vision_model", vision_model, "a path, or None")
    out = given.path("out", out)
    given.text("text_normalization", text_normalization)
    given.flag("overwrite", overwrite)
    given.callback("progress", progress)
    given.check()
    _check_normalization(text_normalization)
    _require_libraries()
    from .convert import manifest_of, read_model, write_graphs

    progress = progress or (lambda step: None)
    with publish_folder(out, manifest=bundle.MANIFEST, overwrite=overwrite) as folder:
        sources = locate(checkpoint, language_model, vision_model, progress)
        progress("reading the checkpoint")
        model = read_model(sources)
        parity = write_graphs(model, folder, progress)
        (folder / bundle.PARITY).write_text(json.dumps(parity, indent=2) + "\n", encoding="utf-8")
        model.tokenizer.save(str(folder / bundle.TOKENIZER))
        progress("hashing the weights")
        manifest = manifest_of(model, text_normalization)
        manifest.write(folder)
    return manifest


def _check_normalization(text_normalization: str) -> None:
    if text_normalization not in bundle.TEXT_NORMALIZATIONS:
        raise CheckpointError(
            f"unknown text normalization {text_normalization!r}, expected one of "
            + ", ".join(bundle.TEXT_NORMALIZATIONS)
        )


def _require_libraries() -> None:
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise EdjeError(
            f"exporting needs {', '.join(missing)}, not installed here",
            hint="pip install 'edje-runtime[export]'",
        )
