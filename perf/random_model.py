"""A full-size scorer with random weights, exported as a user's checkpoint is: for measuring speed.

MiniLM-L12-H384 as EDJE uses it: 12 layers, hidden 384, 12 heads, FFN 1,536, 30,523 words, 64
visual tokens. The adapter is as narrow as the export allows; nothing online runs it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HIDDEN, NUM_LAYERS, NUM_HEADS, INTERMEDIATE = 384, 12, 12, 1536
NUM_WORDS, NUM_POSITIONS, NUM_TOKENS = 30_522, 512, 64
FEATURE_DIM, ADAPTER_INTERMEDIATE = 768, 64
WEIGHT_STD = 0.05  # BERT starts at 0.02, which gives every pair nearly the same score
SEED = 0

CACHE = Path(__file__).parent.parent / ".cache" / "perf"


def full_size_bundle(cache: Path = CACHE) -> Path:
    """Return the model bundle, exported once for every state of the export's source files."""
    folder = cache / f"full-size-{source_hash('export')}"
    if not folder.exists():
        from ..export.export import export_bundle

        with tempfile.TemporaryDirectory() as scratch:
            checkpoint, language_model = write_checkpoint(Path(scratch))
            export_bundle(checkpoint, language_model, folder)
    return folder


def query_of(num_wordpieces: int) -> str:
    """Return a query of so many wordpieces for the bundle's tokenizer."""
    return " ".join(f"word{index}" for index in range(num_wordpieces))


def write_checkpoint(folder: Path) -> tuple[Path, Path]:
    """Write checkpoint and language-model folder in the official layout; return their paths."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    state = {
        name: _values(name, shape, generator) for name, shape in sorted(_tensor_shapes().items())
    }
    checkpoint = folder / "checkpoint.pth"
    torch.save({"model": state}, checkpoint)
    language_model = folder / "language_model"
    language_model.mkdir()
    config = {
        "model_type": "bert",
        "hidden_size": HIDDEN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "intermediate_size": INTERMEDIATE,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "vocab_size": NUM_WORDS,
        "max_position_embeddings": NUM_POSITIONS,
        "type_vocab_size": 2,
    }
    (language_model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"word{index}" for index in range(NUM_WORDS - len(special))]
    (language_model / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return checkpoint, language_model


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    import torch

    if "norm" in name.lower():
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    return torch.randn(shape, generator=generator) * WEIGHT_STD


def _tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Return the official names and shapes of the tensors that the export reads."""
    bert = "language_model.bert."
    shapes: dict[str, tuple[int, ...]] = {
        f"{bert}embeddings.word_embeddings.weight": (NUM_WORDS + 1, HIDDEN),
        f"{bert}embeddings.position_embeddings.weight": (NUM_POSITIONS, HIDDEN),
        f"{bert}embeddings.token_type_embeddings.weight": (2, HIDDEN),
        **_norm(f"{bert}embeddings.LayerNorm", HIDDEN),
        "vision_projection.query": (1, NUM_TOKENS, FEATURE_DIM),
        "vision_projection.attention.in_proj_weight": (3 * FEATURE_DIM, FEATURE_DIM),
        "vision_projection.attention.in_proj_bias": (3 * FEATURE_DIM,),
        **_norm("vision_projection.layernorm", FEATURE_DIM),
        **_linear("vision_projection.mlp.fc1", ADAPTER_INTERMEDIATE, FEATURE_DIM),
        **_linear("vision_projection.mlp.fc2", FEATURE_DIM, ADAPTER_INTERMEDIATE),
        **_linear("vision_projection.projection", HIDDEN, FEATURE_DIM),
        **_linear("classification_head.0.dense", HIDDEN, HIDDEN),
        **_linear("classification_head.1", 1, HIDDEN),
    }
    for name in ("key", "value", "attention.out_proj"):
        shapes |= _linear(f"vision_projection.{name}", FEATURE_DIM, FEATURE_DIM)
    for index in range(NUM_LAYERS):
        layer = f"{bert}encoder.layer.{index}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= _linear(f"{layer}attention.{name}", HIDDEN, HIDDEN)
        shapes |= _norm(f"{layer}attention.output.LayerNorm", HIDDEN)
        shapes |= _linear(f"{layer}intermediate.dense", INTERMEDIATE, HIDDEN)
        shapes |= _linear(f"{layer}output.dense", HIDDEN, INTERMEDIATE)
        shapes |= _norm(f"{layer}output.LayerNorm", HIDDEN)
    return shapes


def _linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def source_hash(folder: str) -> str:
    """Return a hash of this file and of every source below `folder` of the package."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for source in sorted((Path(__file__).parent.parent / folder).rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]
