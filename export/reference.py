"""The three models in PyTorch, as the official code computes them; graphs are checked by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arrays import Array
from ..errors import CheckpointError
from ..machine import thread_limit
from .checkpoint import Checkpoint, CheckpointSizes
from .configs import ACTIVATIONS, LanguageConfig

if TYPE_CHECKING:
    from transformers import SiglipVisionConfig


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the function that a Hugging Face `hidden_act` names (checked by `configs`)."""
    kind, attributes = ACTIVATIONS[name]
    if kind == "Relu":
        return functional.relu
    return partial(functional.gelu, approximate=attributes.get("approximate", "none"))


class Adapter(nn.Module):
    """Learned queries attend to an image's features; a residual MLP and a projection follow.

    Keys and values pass two linear maps each, as in the official code; the queries pass one.

    Source: EDJE paper, equations 1-4; official `token_compression.py`.
    """

    def __init__(self, sizes: CheckpointSizes, num_heads: int, eps: float, activation_name: str):
        super().__init__()
        self.sizes, self.num_heads, self.activation_name = sizes, num_heads, activation_name
        dim = sizes.feature_dim
        self.query = nn.Parameter(torch.zeros(sizes.num_tokens, dim))
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.attention_query = nn.Linear(dim, dim)
        self.attention_key = nn.Linear(dim, dim)
        self.attention_value = nn.Linear(dim, dim)
        self.attention_output = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.ffn1 = nn.Linear(dim, sizes.adapter_intermediate)
        self.ffn2 = nn.Linear(sizes.adapter_intermediate, dim)
        self.projection = nn.Linear(dim, sizes.hidden)
        self.activation = activation(activation_name)

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens float32 [B, m, H] of `features` float32 [B, N, D]."""
        heads = self.num_heads
        query = split_heads(self.attention_query(self.query)[None], heads)
        key = split_heads(self.attention_key(self.key(features)), heads)
        value = split_heads(self.attention_value(self.value(features)), heads)
        query = query.expand(len(features), -1, -1, -1)
        context = functional.scaled_dot_product_attention(query, key, value)
        x = self.attention_output(context.transpose(1, 2).flatten(2))
        x = x + self.ffn2(self.activation(self.ffn1(self.norm(x))))
        tokens: Tensor = self.projection(x)
        return tokens


OFFICIAL = {  # the checkpoint's name of each map, and the one here
    "key": "key",
    "value": "value",
    "attention.out_proj": "attention_output",
    "layernorm": "norm",
    "mlp.fc1": "ffn1",
    "mlp.fc2": "ffn2",
    "projection": "projection",
}


def load_adapter(
    checkpoint: Checkpoint, *, num_heads: int, layer_norm_eps: float, activation: str
) -> Adapter:
    """Return the adapter with the checkpoint's weights, in evaluation mode."""
    tensors = checkpoint.adapter
    state = {"query": tensors["query"][0]}
    for kind in ("weight", "bias"):
        state |= {f"{ours}.{kind}": tensors[f"{name}.{kind}"] for name, ours in OFFICIAL.items()}
        joined = tensors[f"attention.in_proj_{kind}"]  # query, key, value maps, stacked
        for name, part in zip(("query", "key", "value"), joined.chunk(3), strict=True):
            state[f"attention_{name}.{kind}"] = part
    adapter = Adapter(checkpoint.sizes, num_heads, layer_norm_eps, activation)
    adapter.load_state_dict(state)
    return adapter.eval()


class ImageEncoder(nn.Module):
    """`pixels` -> visual tokens. `tower` is a `SiglipVisionModel` without its pooling head."""

    def __init__(self, tower: nn.Module, adapter: Adapter):
        super().__init__()
        self.tower, self.adapter = tower, adapter

    def forward(self, pixels: Tensor) -> Tensor:
        """Return visual tokens float32 [B, m, H] of `pixels` float32 [B, 3, R, R]."""
        features = self.tower(pixel_values=pixels).last_hidden_state
        tokens: Tensor = self.adapter(features)
        return tokens


def load_tower(config: SiglipVisionConfig, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return transformers' `SiglipVisionModel` with `tensors` in place of its random weights.

    Args:
        config: without the pooling head.
        tensors: checked tensors, named without `vision_encoder.` and `vision_model.`.
    """
    from transformers import SiglipVisionModel

    with torch.device("meta"):  # no memory and no random weights: both come with `tensors`
        tower: nn.Module = SiglipVisionModel(config).eval()
    inner = "vision_model." if hasattr(tower, "vision_model") else ""  # transformers 4 nests it
    tower.load_state_dict({inner + name: value for name, value in tensors.items()}, assign=True)
    embeddings = tower.get_submodule(f"{inner}embeddings")
    positions = len(tensors["embeddings.position_embedding.weight"])
    embeddings.position_ids = torch.arange(positions)[None]  # not in a checkpoint
    return tower


MASKED = -1e4  # added to masked attention logits: exp() gives exact zeros, and float16 holds it
OFFICIAL_LAYER = {  # the checkpoint's name of each map in a layer, and the one here
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "ffn1",
    "output.dense": "ffn2",
    "output.LayerNorm": "ffn_norm",
}


class JointEncoder(nn.Module):
    """BERT body over text and stored visual tokens, then pooler and matching head.

    Args:
        config: sizes of the language model.
        num_tokens: m, visual tokens an image.

    Source: EDJE paper (arXiv 2510.06820) section 3; `compute_logits` of the official code.
    """

    def __init__(self, config: LanguageConfig, num_tokens: int):
        super().__init__()
        self.config, self.num_tokens = config, num_tokens
        hidden = config.hidden
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden)
        self.position_embeddings = nn.Embedding(config.max_positions, hidden)
        self.type_embeddings = nn.Embedding(2, hidden)
        self.embedding_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.pooler = nn.Linear(hidden, hidden)
        self.classifier = nn.Linear(hidden, 1)

    def forward(
        self, text_ids: Tensor, text_length: Tensor, query_of_pair: Tensor, visual_tokens: Tensor
    ) -> Tensor:
        """Return `scores` float32 [P], the raw logits.

        Args:
            text_ids: int32 [Q, T]: `[CLS] wordpieces [SEP]`, right-padded with 0.
            text_length: int32 [Q]: real ids of each query, CLS and SEP included.
            query_of_pair: int32 [P]: which query each pair asks.
            visual_tokens: float16 or float32 [P, m, H].
        """
        text, positions, sep = self._embed_queries(text_ids, text_length)
        visual = visual_tokens.float() + positions.index_select(0, query_of_pair)
        x = torch.cat(  # [P, T + m + 1, H]
            [
                text.index_select(0, query_of_pair),
                self.embedding_norm(visual),
                sep.index_select(0, query_of_pair),
            ],
            dim=1,
        )
        mask = self._mask(text_ids.shape[1], text_length).index_select(0, query_of_pair)
        for layer in self.layers[:-1]:
            x = layer(x, x, mask)
        cls = self.layers[-1](x[:, :1], x, mask)  # only the CLS row is read afterwards
        pooled = torch.tanh(self.pooler(cls[:, 0]))
        scores: Tensor = self.classifier(pooled).squeeze(-1)
        return scores

    def _embed_queries(self, ids: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what one query gives all its pairs: text, visual positions, last SEP."""
        num_queries, slots = ids.shape
        words = self.word_embeddings.weight
        positions = self.position_embeddings.weight
        first_type, second_type = self.type_embeddings.weight
        text = words.index_select(0, ids.flatten()).view(num_queries, slots, -1)
        text = self.embedding_norm(text + positions[:slots] + first_type)
        tail = length[:, None] + torch.arange(self.num_tokens + 1)  # visual tokens, then SEP
        tail = positions.index_select(0, tail.flatten()).view(num_queries, self.num_tokens + 1, -1)
        tail = tail + second_type
        sep = self.embedding_norm(tail[:, -1:] + words[self.config.sep_id])
        return text, tail[:, :-1], sep

    def _mask(self, slots: int, length: Tensor) -> Tensor:
        """Return [Q, 1, 1, S]: 0 for real slots, `MASKED` for text padding."""
        padding = torch.arange(slots) >= length[:, None]
        mask = functional.pad(padding.float() * MASKED, (0, self.num_tokens + 1))
        return mask[:, None, None, :]


class Layer(nn.Module):
    """One post-norm transformer layer of BERT; `rows` may be fewer than the attended slots."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        hidden, eps = config.hidden, config.layer_norm_eps
        self.num_heads = config.num_heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=eps)
        self.ffn1 = nn.Linear(hidden, config.intermediate)
        self.ffn2 = nn.Linear(config.intermediate, hidden)
        self.ffn_norm = nn.LayerNorm(hidden, eps=eps)
        self.activation_name = config.activation
        self.activation = activation(config.activation)

    def forward(self, rows: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        """Return [P, R, H] for `rows` [P, R, H] that attend to `slots` [P, S, H]."""
        query = split_heads(self.query(rows), self.num_heads)
        key = split_heads(self.key(slots), self.num_heads)
        value = split_heads(self.value(slots), self.num_heads)
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        context = context.transpose(1, 2).flatten(2)
        rows = self.attention_norm(rows + self.attention_output(context))
        rows = self.ffn_norm(rows + self.ffn2(self.activation(self.ffn1(rows))))
        return rows


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Return [B, heads, S, d] for [B, S, H]."""
    batch, slots, _ = x.shape
    return x.view(batch, slots, num_heads, -1).transpose(1, 2)


def load_joint_encoder(checkpoint: Checkpoint, config: LanguageConfig) -> JointEncoder:
    """Return the joint encoder with the checkpoint's weights, in evaluation mode."""
    bert = checkpoint.bert
    positions = bert["embeddings.position_embeddings.weight"]
    unused = positions[-1:].expand(config.max_positions - len(positions), -1)
    positions = torch.cat([positions, unused])  # padded text slots have a position, too
    state = {
        "word_embeddings.weight": bert["embeddings.word_embeddings.weight"],
        "position_embeddings.weight": positions,
        "type_embeddings.weight": bert["embeddings.token_type_embeddings.weight"],
    }
    renamed = [("embeddings.LayerNorm", "embedding_norm")]
    for index in range(config.num_layers):
        renamed += [
            (f"encoder.layer.{index}.{official}", f"layers.{index}.{ours}")
            for official, ours in OFFICIAL_LAYER.items()
        ]
    for kind in ("weight", "bias"):
        state |= {f"{ours}.{kind}": bert[f"{official}.{kind}"] for official, ours in renamed}
        state[f"pooler.{kind}"] = checkpoint.head[f"0.dense.{kind}"]
        state[f"classifier.{kind}"] = checkpoint.head[f"1.{kind}"]
    model = JointEncoder(config, checkpoint.sizes.num_tokens)
    model.load_state_dict(state)
    return model.eval()


SEED = 20251
MAX_DIFFERENCE = 1e-3  # of the largest output; float16 outputs are rounded by half of that
SCORER_SHAPES = ((1, 16, 1), (1, 24, 3), (3, 32, 5), (4, 63, 2))  # (Q, T, P)

Feeds = Iterator[dict[str, Array]]


def check_parity(path: Path, reference: nn.Module, feeds: Feeds) -> dict[str, Any]:
    """Run the graph at `path` and the reference on `feeds`; return the largest difference.

    Raises:
        CheckpointError: the difference exceeds `MAX_DIFFERENCE` of the largest output.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_limit(sees_affinity=False) or 0  # 0: all cores
    if (num_threads := thread_limit(sees_affinity=True)) is not None:
        torch.set_num_threads(num_threads)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    difference, scale, shapes = 0.0, 0.0, []
    for feed in feeds:
        (got,) = session.run(None, feed)
        with torch.inference_mode():
            want = reference(*map(torch.from_numpy, feed.values())).numpy()
        # np.maximum, unlike max(), keeps a NaN
        difference = float(np.maximum(difference, np.abs(got.astype(np.float32) - want).max()))
        scale = max(scale, float(np.abs(want).max()))
        shapes.append({name: list(value.shape) for name, value in feed.items()})
    limit = MAX_DIFFERENCE * max(scale, 1.0)
    if not difference <= limit:
        raise CheckpointError(
            f"{path.name} differs from PyTorch by {difference:.2e} on outputs up to {scale:.2e}, "
            f"expected at most {limit:.2e}; nothing was written"
        )
    return {
        "max_abs_difference": difference,
        "limit": limit,
        "max_abs_output": scale,
        "output_dtype": str(got.dtype),
        "runtime": f"onnxruntime {onnxruntime.__version__}, CPU, float32",
        "seed": SEED,
        "inputs": shapes,
    }


def scorer_feeds(config: LanguageConfig, num_tokens: int) -> Feeds:
    """Yield inputs of the joint encoder: mixed queries of every length that fits."""
    rng = np.random.default_rng(SEED)
    for num_queries, slots, num_pairs in SCORER_SHAPES:
        longest = min(slots, config.max_positions - num_tokens - 1)
        lengths = rng.integers(3, longest + 1, num_queries).astype(np.int32)
        ids = rng.integers(0, config.vocab_size, (num_queries, slots)).astype(np.int32)
        ids[:, 0] = config.cls_id
        for row, length in zip(ids, lengths, strict=True):
            row[length - 1] = config.sep_id
            row[length:] = 0
        tokens = rng.standard_normal((num_pairs, num_tokens, config.hidden))
        yield {
            "text_ids": ids,
            "text_length": lengths,
            "query_of_pair": rng.integers(0, num_queries, num_pairs).astype(np.int32),
            "visual_tokens": tokens.astype(np.float16),
        }


def adapter_feeds(num_features: int, feature_dim: int) -> Feeds:
    """Yield features of one and of three images."""
    rng = np.random.default_rng(SEED)
    for batch in (1, 3):
        features = rng.standard_normal((batch, num_features, feature_dim))
        yield {"features": features.astype(np.float32)}


def image_feeds(size: int) -> Feeds:
    """Yield pixels of two images of noise (one batch: a large tower takes seconds an image)."""
    rng = np.random.default_rng(SEED)
    yield {"pixels": rng.uniform(-1, 1, (2, 3, size, size)).astype(np.float32)}
