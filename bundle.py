"""`edje.json`: what a model bundle says of itself. One reader and one writer for every layer.

A bundle is a folder: `edje.json`, `tokenizer.json`, `joint_encoder.onnx`, `adapter.onnx`,
optionally `image_encoder.onnx`, and `parity.json`. `export/` writes it, `engines/` builds
from it, `runtime/` indexes with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .arguments import StrPath, path_of, read_fields
from .errors import CheckpointError

FORMAT_VERSION = 2  # 2: query, key and value are three products of the joint encoder
MANIFEST = "edje.json"
TOKENIZER = "tokenizer.json"
JOINT_ENCODER = "joint_encoder.onnx"
ADAPTER = "adapter.onnx"
IMAGE_ENCODER = "image_encoder.onnx"
PARITY = "parity.json"

TEXT_NORMALIZATIONS = ("openclip", "none")

# The names in `joint_encoder.onnx`: `export` writes the graph with them, and by them the engines
# find what to lower, to quantise and to look for in a compiled model. A node is `/path/Kind`, as
# `/layers.3/ffn1/MatMul`; its output is `/path/Kind_output`; a linear's weight `path.weight`.
INPUTS = ("text_ids", "text_length", "query_of_pair", "visual_tokens")
VISUAL_TOKENS, VISUAL_SCALES = "visual_tokens", "visual_scales"
OUTPUT = "scores"
WORD_EMBEDDINGS = "embeddings/word"
TEXT_SLOTS = "text/slots"  # numbers of the text slots, made from the length of `text_ids`
# The parts of a layer. Six are linears: matrix products with weights, to be quantised.
QUERY, KEY, VALUE, ATTENTION_OUTPUT = "query", "key", "value", "attention_output"
FFN1, FFN2 = "ffn1", "ffn2"
LINEARS = (QUERY, KEY, VALUE, ATTENTION_OUTPUT, FFN1, FFN2)
ATTENTION_SCORES, ATTENTION, CONTEXT = "attention_scores", "attention", "context"
# Linears that read one value keep or change their precision together: a layer group.
QKV = "qkv"
# What precision passes add to names. A quantised linear reads `VALUE.dequantized` or, with scales
# found while running, `VALUE.dynamic`; its weight W comes as `W.dequantized` from `W.quantized`.
QUANTIZED, DEQUANTIZED, SCALES = "quantized", "dequantized", "scales"
DYNAMIC, SMOOTH = "dynamic", "smooth"
# What a graph that ends after some layers has in place of pooler and classifier.
SHALLOW = "shallow"
_LAYER = re.compile(r"/layers\.(\d+)/")


def node_name(path: str, kind: str) -> str:
    """Return the name of the node of a `kind` (`MatMul`) at `path` (`layers.3/ffn1`)."""
    return f"/{path}/{kind}"


def value_name(path: str, kind: str) -> str:
    """Return the name of that node's one output."""
    return f"{node_name(path, kind)}_output"


def path_of_node(name: str) -> str:
    """Return the path in a node's name: `layers.3/ffn1` of `/layers.3/ffn1/MatMul`."""
    return name.strip("/").rpartition("/")[0]


def weight_name(path: str, what: str = "weight") -> str:
    """Return the name of a weight of the node at `path`: `layers.3.ffn1.weight`."""
    return f"{path.replace('/', '.')}.{what}"


def layer_path(number: int, part: str = "") -> str:
    """Return the path of an encoder layer, or of one of its parts: `layers.3/ffn1`."""
    return f"layers.{number}/{part}" if part else f"layers.{number}"


def layer_of(name: str) -> int | None:
    """Return which encoder layer a node or value belongs to; None for all outside of them."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def linear_of(node: str) -> str:
    """Return the linear that a node belongs to, as manifests write it: `layers.3.ffn1`."""
    return path_of_node(node).replace("/", ".")


def group_of(linear: str) -> str:
    """Return a linear's layer group: `layers.3.qkv` for query, key and value, else itself."""
    layer, _, part = linear.rpartition(".")
    return f"{layer}.{QKV}" if part in (QUERY, KEY, VALUE) else linear


def products_of(group: str) -> tuple[str, ...]:
    """Return the nodes of a layer group: `/layers.3/ffn1/MatMul` of `layers.3.ffn1`."""
    layer, _, part = group.rpartition(".")
    parts = (QUERY, KEY, VALUE) if part == QKV else (part,)
    return tuple(node_name(f"{layer}/{part}", "MatMul") for part in parts)


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of the exported graphs.

    `feature_dim` is D of the vision tower, `num_features` its tokens an image (None where the
    bundle has no image encoder and the adapter takes any number).
    """

    num_tokens: int
    hidden: int
    num_layers: int
    num_heads: int
    intermediate: int
    vocab_size: int
    feature_dim: int
    num_features: int | None


@dataclass(frozen=True, slots=True)
class TextSpec:
    """How a query becomes `text_ids`.

    `max_wordpieces` excludes CLS and SEP: 61 in the official model (64 + m positions less m
    image tokens, CLS and two SEP). `normalization` is one of `TEXT_NORMALIZATIONS`.
    """

    normalization: str
    max_wordpieces: int
    cls_id: int
    sep_id: int
    pad_id: int


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How an image file becomes `pixels`: RGB, squashed to `size` x `size`, scaled, normalised.

    `resample` is Pillow's number (2 bilinear, 3 bicubic); aspect ratio is not kept.
    Source: the SiglipImageProcessor settings of the SigLIP folder.
    """

    size: int
    resample: int
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class BundleManifest:
    """The content of `edje.json`.

    `fingerprint_encoder` covers what makes stored tokens (vision tower, adapter) and
    `fingerprint_scorer` what scores them: sha256 over tensor names, shapes and float32 values.
    """

    sizes: ModelSizes
    text: TextSpec
    image: ImageSpec | None
    fingerprint_encoder: str
    fingerprint_scorer: str
    provenance: Mapping[str, Any]
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, source: str = MANIFEST) -> BundleManifest:
        """Rebuild a manifest from `to_json` values.

        Raises:
            CheckpointError: another format version, or fields missing or unknown (all named).
        """
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{source} has format version {version!r}, this edje reads {FORMAT_VERSION}",
                hint="export the checkpoint again with `edje export`",
            )
        faults: list[str] = []
        manifest = read_fields(cls, values, "", faults)
        if manifest is None:
            raise CheckpointError(
                f"{source} is not a bundle manifest of format version {FORMAT_VERSION}",
                faults=faults,
                hint="export the checkpoint again with `edje export`",
            )
        return manifest

    def write(self, folder: Path) -> None:
        """Write `edje.json` into `folder`."""
        text = json.dumps(self.to_json(), indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: StrPath) -> BundleManifest:
        """Read `edje.json` of the bundle at `folder`.

        Raises:
            CheckpointError: no bundle there, or a manifest that cannot be read.
        """
        path = path_of("bundle", folder) / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} is not a model bundle: cannot read {MANIFEST} ({error})",
                hint="make one: edje export CHECKPOINT --language-model DIR --out BUNDLE",
            ) from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds {type(values).__name__}, expected an object")
        return cls.from_json(values, source=str(path))


def read_parity(folder: Path) -> dict[str, dict[str, Any]]:
    """Return `parity.json` of the bundle at `folder`: how far each graph is from PyTorch.

    Raises:
        CheckpointError: it is not there or cannot be read.
    """
    path = folder / PARITY
    try:
        values: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}", hint="export the checkpoint again with `edje export`"
        ) from error
    return values
