"""`edje export`: an official checkpoint and its Hugging Face folders -> a model bundle.

Importing this module loads no heavy library; the call does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, bundle
from ..arguments import Arguments, StrPath
from ..bundle import BundleManifest, ImageSpec, ModelSizes, TextSpec
from ..errors import CheckpointError, EdjeError
from ..files import publish_folder, sha256_of
from .checkpoint import MAX_TEXT, Checkpoint, read_checkpoint
from .configs import (
    OFFICIAL_VISION_EPS,
    LanguageConfig,
    adapter_heads,
    num_features,
    read_language_model,
    read_tokenizer,
    read_vision_model,
)
from .sources import Progress, Sources, locate

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import SiglipVisionConfig

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
        vision_model: Hugging Face folder of the SigLIP model (config and image processor); None
            writes no `image_encoder.onnx`, and the bundle cannot index images.
        text_normalization: `openclip` (as the model was trained) or `none`.
        progress: called with the name of each step as it starts, and the bytes fetched so far.

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
    _check(text_normalization)
    progress = progress or (lambda step: None)
    with publish_folder(out, manifest=bundle.MANIFEST, overwrite=overwrite) as folder:
        sources = locate(checkpoint, language_model, vision_model, progress)
        progress("reading the checkpoint")
        model = _read_model(sources)
        parity = _write_graphs(model, folder, progress)
        (folder / bundle.PARITY).write_text(json.dumps(parity, indent=2) + "\n", encoding="utf-8")
        model.tokenizer.save(str(folder / bundle.TOKENIZER))
        progress("hashing the weights")
        manifest = _manifest_of(model, text_normalization)
        manifest.write(folder)
    return manifest


def _check(text_normalization: str) -> None:
    """Refuse an unknown normalization, and a machine without the libraries."""
    if text_normalization not in bundle.TEXT_NORMALIZATIONS:
        raise CheckpointError(
            f"unknown text normalization {text_normalization!r}, expected one of "
            + ", ".join(bundle.TEXT_NORMALIZATIONS)
        )
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise EdjeError(
            f"exporting needs {', '.join(missing)}, not installed here",
            hint="pip install 'edje-runtime[export]'",
        )


def fingerprint(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) over `settings` and the sorted (name, shape, float32 values).

    Values are hashed as little-endian float32, so a checkpoint and its bfloat16 twin with the
    same values, in either spelling of the vision keys, have one fingerprint.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(tensors):
        values = tensors[name].detach().float().contiguous().numpy().astype("<f4", copy=False)
        digest.update(f"\n{name} {list(values.shape)}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Model:
    """A checkpoint with all that its folders say of it."""

    sources: Sources
    checkpoint: Checkpoint
    language: LanguageConfig
    tokenizer: Tokenizer
    vision: SiglipVisionConfig | None
    image: ImageSpec | None


def _read_model(sources: Sources) -> _Model:
    read = read_checkpoint(sources.checkpoint.path)
    tokenizer = read_tokenizer(sources.language_model.path)
    language = read_language_model(sources.language_model.path, read, tokenizer)
    if sources.vision_model is None:
        return _Model(sources, read, language, tokenizer, None, None)
    vision, image = read_vision_model(sources.vision_model.path, read)
    return _Model(sources, read, language, tokenizer, vision, image)


def _write_graphs(model: _Model, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write every graph, checked, into `folder`; return what `parity.json` says of them."""
    import onnx

    from . import onnx_graphs, reference

    checkpoint, language, vision = model.checkpoint, model.language, model.vision
    sizes, parity = checkpoint.sizes, {}

    def save(name: str, graph: onnx.ModelProto, module: Any, feeds: reference.Feeds) -> None:
        onnx.save(graph, str(folder / name))
        parity[name] = reference.check_parity(folder / name, module, feeds)

    progress("exporting the joint encoder")
    scorer = reference.load_joint_encoder(checkpoint, language)
    feeds = reference.scorer_feeds(language, sizes.num_tokens)
    save(bundle.JOINT_ENCODER, onnx_graphs.joint_encoder_graph(scorer), scorer, feeds)
    progress("exporting the adapter")
    adapter = reference.load_adapter(
        checkpoint,
        num_heads=vision.num_attention_heads if vision else adapter_heads(checkpoint),
        layer_norm_eps=vision.layer_norm_eps if vision else OFFICIAL_VISION_EPS,
        activation=language.activation,
    )
    feeds = reference.adapter_feeds(num_features(vision) if vision else 49, sizes.feature_dim)
    save(bundle.ADAPTER, onnx_graphs.adapter_graph(adapter), adapter, feeds)
    if vision is not None:
        progress("exporting the image encoder")
        tower = reference.load_tower(vision, checkpoint.vision)
        encoder = reference.ImageEncoder(tower, adapter)
        feeds = reference.image_feeds(vision.image_size)
        graph = onnx_graphs.image_encoder_graph(encoder, vision)
        save(bundle.IMAGE_ENCODER, graph, encoder, feeds)
    return parity


def _manifest_of(model: _Model, text_normalization: str) -> BundleManifest:
    """Return what `edje.json` says of the model; hashes its weights."""
    read, language = model.checkpoint, model.language
    sizes = read.sizes
    encoder = _named(adapter=read.adapter, vision=read.vision)  # all that makes stored tokens
    scorer = _named(bert=read.bert, head=read.head)
    return BundleManifest(
        sizes=ModelSizes(
            num_tokens=sizes.num_tokens,
            hidden=sizes.hidden,
            num_layers=sizes.num_layers,
            num_heads=language.num_heads,
            intermediate=sizes.intermediate,
            vocab_size=sizes.vocab_size,
            feature_dim=sizes.feature_dim,
            num_features=num_features(model.vision) if model.vision else None,
        ),
        text=TextSpec(
            normalization=text_normalization,
            max_wordpieces=min(MAX_TEXT, sizes.max_positions - sizes.num_tokens) - 3,
            cls_id=language.cls_id,
            sep_id=language.sep_id,
            pad_id=language.pad_id,
        ),
        image=model.image,
        fingerprint_encoder=fingerprint(
            encoder, {"image": asdict(model.image) if model.image else None}
        ),
        fingerprint_scorer=fingerprint(scorer, {"num_heads": language.num_heads}),
        provenance=_provenance(model),
    )


def _named(**parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of all parts, each as `part.name`."""
    return {f"{part}.{name}": group[name] for part, group in parts.items() for name in group}


def _provenance(model: _Model) -> dict[str, Any]:
    """Say how the bundle was made; it needs no installed metadata, so a bare clone can export."""
    from .onnx_blocks import OPSET

    path = model.checkpoint.path
    libraries = ("torch", "transformers", "onnx", "onnxruntime", "tokenizers")
    versions = {name: str(import_module(name).__version__) for name in libraries}
    return {
        "checkpoint": path.name,
        "checkpoint_sha256": sha256_of(path),
        "dropped_from_keys": dict(model.checkpoint.dropped),
        "sources": model.sources.to_json(),
        "versions": {"edje-runtime": __version__, **versions},
        "opset": OPSET,
        "exported_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
