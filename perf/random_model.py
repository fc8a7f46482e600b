"""What speed is measured on: a full-size scorer with random weights, random pairs, and stores.

MiniLM-L12-H384 as EDJE uses it: 12 layers, hidden 384, 12 heads, FFN 1,536, 30,523 words, 64
visual tokens, exported as a user's checkpoint is. The adapter is as narrow as the export allows;
nothing online runs it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..arrays import Array, Float16, Float32, Int32
from ..bundle import BundleManifest, ModelSizes, TextSpec
from ..engines.contract import Batch, Progress
from ..runtime.store import TokenStore
from ..runtime.text import QueryTokenizer

if TYPE_CHECKING:
    import torch

HIDDEN, NUM_LAYERS, NUM_HEADS, INTERMEDIATE = 384, 12, 12, 1536
NUM_WORDS, NUM_POSITIONS, NUM_TOKENS = 30_522, 512, 64
FEATURE_DIM, ADAPTER_INTERMEDIATE = 768, 64
WEIGHT_STD = 0.05  # BERT starts at 0.02, which gives every pair nearly the same score
SEED = 0
FASTEST = ("int8", "bf16", "fp32")  # a random scorer's precisions, the fastest first
APPENDED_AT_ONCE = 1024  # records
DESCRIPTION = "12 layers, hidden 384, FFN 1536, 64 tokens, random weights"

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


def full_size_engine(
    bundle: Path, backend: str, precision: str | None, progress: Progress | None = None
) -> Path:
    """Return an engine of the cached bundle, built once for every state of the sources.

    Args:
        precision: None: the first of `FASTEST` that the backend runs on this machine.

    Raises:
        EngineError: the backend does not run `precision` here, or none of them.
    """
    from ..engines.builder.cache import cached_engine
    from ..engines.registry import load_backend
    from ..engines.samples import RandomSamples

    if precision is None:
        run = [one for one in FASTEST if load_backend(backend).why_not(one) is None]
        precision = run[0] if run else FASTEST[-1]
    return cached_engine(
        bundle,
        CACHE / f"engines-{source_hash('engines')}",
        backend=backend,
        precision=precision,
        calibration=RandomSamples(BundleManifest.read(bundle)),
        progress=progress,
    )


def full_size() -> ModelSizes:
    """Return the sizes of the full-size model, without exporting it."""
    return ModelSizes(
        num_tokens=NUM_TOKENS,
        hidden=HIDDEN,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        intermediate=INTERMEDIATE,
        vocab_size=NUM_WORDS + 1,
        feature_dim=FEATURE_DIM,
        num_features=None,
    )


@dataclass(frozen=True, slots=True)
class Pairs:
    """One query with its candidates, and what they score.

    Attributes:
        num_wordpieces: of the query.
        text_ids: int32 [1, T]; what follows the wordpieces, CLS and SEP is padding.
        tokens: float16 [N, m, H] in host memory.
        expected: float32 [M], scores of the first M <= N in float32.
        reference: what computed them.
    """

    num_wordpieces: int
    text_ids: Int32
    tokens: Float16
    expected: Float32 = field(default_factory=lambda: np.empty(0, np.float32))
    reference: str = ""

    def batch(self, start: int, size: int) -> Batch:
        """Return `size` pairs from `start` on, beginning again at the end; a view where it can."""
        rows = np.arange(start, start + size) % len(self.tokens)
        whole = rows[-1] - rows[0] == size - 1
        tokens = self.tokens[rows[0] : rows[0] + size] if whole else self.tokens[rows]
        length = np.array([self.num_wordpieces + 2], np.int32)
        return Batch(self.text_ids, length, np.zeros(size, np.int32), tokens)

    def batches(self, size: int) -> list[Batch]:
        """Return all pairs in batches of `size`, the last one as long as it comes."""
        num_pairs = len(self.tokens)
        return [
            self.batch(start, min(size, num_pairs - start)) for start in range(0, num_pairs, size)
        ]


def random_tokens(num_records: int, sizes: ModelSizes) -> Float16:
    """Return seeded standard normal tokens, float16 [N, m, H]."""
    shape = (num_records, sizes.num_tokens, sizes.hidden)
    return np.random.default_rng(SEED).standard_normal(shape, np.float32).astype(np.float16)


def query_of(num_wordpieces: int) -> str:
    """Return a query of so many wordpieces for the bundle's tokenizer."""
    return " ".join(f"word{index}" for index in range(num_wordpieces))


def query_ids(folder: Path, spec: TextSpec, query: str) -> Int32:
    """Return the query as a reranker of `folder` tokenises it, unpadded: int32 [1, T]."""
    queries = QueryTokenizer.open(folder, spec)([query])
    return queries.text_ids[:, : queries.text_length[0]]


def image_id(number: int) -> str:
    """Return an id as services have them."""
    return f"images/{number // 1000:04}/{number:07}.jpg"


def write_store(
    path: Path,
    tokens: Array,
    scales: Array | None = None,
    *,
    dtype: str | None = None,
    encoder: str = "random",
) -> TokenStore:
    """Write tokens [N, m, H] (and scales [N, m]) under the ids of `image_id`; return the store.

    Args:
        dtype: of the store; None takes that of the tokens.
        encoder: fingerprint of the encoder that the store says it belongs to.
    """
    store = TokenStore.create(
        path,
        num_tokens=tokens.shape[1],
        hidden=tokens.shape[2],
        fingerprint_encoder=encoder,
        dtype=dtype or str(tokens.dtype),
    )
    for start in range(0, len(tokens), APPENDED_AT_ONCE):
        part = slice(start, start + APPENDED_AT_ONCE)
        records = np.ascontiguousarray(tokens[part])
        ids = [image_id(start + at) for at in range(len(records))]
        store.append(ids, records, None if scales is None else scales[part])
    return store


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
    bert, adapter, head = "language_model.bert.", "vision_projection.", "classification_head."
    embeddings = f"{bert}embeddings."
    norms = {f"{embeddings}LayerNorm": HIDDEN, f"{adapter}layernorm": FEATURE_DIM}
    linears = {
        f"{adapter}mlp.fc1": (ADAPTER_INTERMEDIATE, FEATURE_DIM),
        f"{adapter}mlp.fc2": (FEATURE_DIM, ADAPTER_INTERMEDIATE),
        f"{adapter}projection": (HIDDEN, FEATURE_DIM),
        f"{head}0.dense": (HIDDEN, HIDDEN),
        f"{head}1": (1, HIDDEN),
    }
    for name in ("key", "value", "attention.out_proj"):
        linears[adapter + name] = (FEATURE_DIM, FEATURE_DIM)
    for index in range(NUM_LAYERS):
        layer = f"{bert}encoder.layer.{index}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            linears[f"{layer}attention.{name}"] = (HIDDEN, HIDDEN)
        linears[f"{layer}intermediate.dense"] = (INTERMEDIATE, HIDDEN)
        linears[f"{layer}output.dense"] = (HIDDEN, INTERMEDIATE)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            norms[layer + name] = HIDDEN
    shapes: dict[str, tuple[int, ...]] = {
        f"{embeddings}word_embeddings.weight": (NUM_WORDS + 1, HIDDEN),
        f"{embeddings}position_embeddings.weight": (NUM_POSITIONS, HIDDEN),
        f"{embeddings}token_type_embeddings.weight": (2, HIDDEN),
        f"{adapter}query": (1, NUM_TOKENS, FEATURE_DIM),
        f"{adapter}attention.in_proj_weight": (3 * FEATURE_DIM, FEATURE_DIM),
        f"{adapter}attention.in_proj_bias": (3 * FEATURE_DIM,),
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def source_hash(folder: str) -> str:
    """Return a hash of this file and of every source below `folder` of the package."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for source in sorted((Path(__file__).parent.parent / folder).rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]
