"""A checkpoint with its folders read, made into graphs, checked and described. Needs torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, bundle
from ..bundle import BundleManifest, ImageSpec, ModelSizes, TextSpec
from ..files import sha256_of
from .checkpoint import MAX_TEXT, Checkpoint, read_checkpoint
from .configs import (
    OFFICIAL_VISION_EPS,
    LanguageConfig,
    VisionConfig,
    adapter_heads,
    read_language_model,
    read_tokenizer,
    read_vision_model,
)
from .onnx_blocks import OPSET
from .onnx_graphs import adapter_graph, image_encoder_graph, joint_encoder_graph
from .parity import adapter_feeds, check_parity, image_feeds, scorer_feeds
from .reference import Adapter, ImageEncoder, load_adapter, load_joint_encoder, load_tower
from .sources import Progress, Sources

if TYPE_CHECKING:
    import onnx
    from tokenizers import Tokenizer
    from torch import Tensor


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
class Model:
    """A checkpoint with all that its folders say of it."""

    sources: Sources
    checkpoint: Checkpoint
    language: LanguageConfig
    tokenizer: Tokenizer
    vision: VisionConfig | None
    image: ImageSpec | None


def read_model(sources: Sources) -> Model:
    """Read the checkpoint and what its folders say of it.

    Raises:
        CheckpointError: one of them cannot be used.
    """
    read = read_checkpoint(sources.checkpoint.path)
    tokenizer = read_tokenizer(sources.language_model.path)
    language = read_language_model(sources.language_model.path, read, tokenizer)
    if sources.vision_model is None:
        return Model(sources, read, language, tokenizer, None, None)
    vision, image = read_vision_model(sources.vision_model.path, read)
    return Model(sources, read, language, tokenizer, vision, image)


def write_graphs(model: Model, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write every graph into `folder`; return what `parity.json` says of them.

    Raises:
        CheckpointError: a graph differs from PyTorch.
    """
    sizes = model.checkpoint.sizes
    parity: dict[str, Any] = {}
    progress("exporting the joint encoder")
    scorer = load_joint_encoder(model.checkpoint, model.language)
    path = _save(joint_encoder_graph(scorer), folder / bundle.JOINT_ENCODER)
    parity[path.name] = check_parity(path, scorer, scorer_feeds(model.language, sizes.num_tokens))

    progress("exporting the adapter")
    adapter = _adapter(model)
    num_features = model.vision.num_features if model.vision else 49
    path = _save(adapter_graph(adapter), folder / bundle.ADAPTER)
    parity[path.name] = check_parity(path, adapter, adapter_feeds(num_features, sizes.feature_dim))
    if model.vision is not None:
        progress("exporting the image encoder")
        tower = load_tower(model.vision.settings, model.checkpoint.vision)
        encoder = ImageEncoder(tower, adapter)
        path = _save(image_encoder_graph(encoder, model.vision), folder / bundle.IMAGE_ENCODER)
        parity[path.name] = check_parity(path, encoder, image_feeds(model.vision.image_size))
    return parity


def _adapter(model: Model) -> Adapter:
    vision = model.vision
    return load_adapter(
        model.checkpoint,
        num_heads=vision.num_heads if vision else adapter_heads(model.checkpoint),
        layer_norm_eps=vision.layer_norm_eps if vision else OFFICIAL_VISION_EPS,
        activation=model.language.activation,
    )


def _save(model: onnx.ModelProto, path: Path) -> Path:
    import onnx

    onnx.save(model, str(path))
    return path


def manifest_of(model: Model, text_normalization: str) -> BundleManifest:
    """Return what `edje.json` says of the model; hashes its weights."""
    sizes, language = model.checkpoint.sizes, model.language
    return BundleManifest(
        sizes=ModelSizes(
            num_tokens=sizes.num_tokens,
            hidden=sizes.hidden,
            num_layers=sizes.num_layers,
            num_heads=language.num_heads,
            intermediate=sizes.intermediate,
            vocab_size=sizes.vocab_size,
            feature_dim=sizes.feature_dim,
            num_features=model.vision.num_features if model.vision else None,
        ),
        text=TextSpec(
            normalization=text_normalization,
            max_wordpieces=min(MAX_TEXT, sizes.max_positions - sizes.num_tokens) - 3,
            cls_id=language.cls_id,
            sep_id=language.sep_id,
            pad_id=language.pad_id,
        ),
        image=model.image,
        fingerprint_encoder=_encoder_fingerprint(model),
        fingerprint_scorer=_scorer_fingerprint(model),
        provenance=_provenance(model),
    )


def _encoder_fingerprint(model: Model) -> str:
    """Hash what makes stored tokens: vision tower, adapter, preprocessing."""
    adapter = {f"adapter.{name}": value for name, value in model.checkpoint.adapter.items()}
    vision = {f"vision.{name}": value for name, value in model.checkpoint.vision.items()}
    image = asdict(model.image) if model.image else None
    return fingerprint({**adapter, **vision}, {"image": image})


def _scorer_fingerprint(model: Model) -> str:
    """Hash what scores stored tokens: BERT body and matching head."""
    bert = {f"bert.{name}": value for name, value in model.checkpoint.bert.items()}
    head = {f"head.{name}": value for name, value in model.checkpoint.head.items()}
    return fingerprint({**bert, **head}, {"num_heads": model.language.num_heads})


def _provenance(model: Model) -> dict[str, Any]:
    """Say how the bundle was made; it needs no installed metadata, so a bare clone can export."""
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
