"""The scorer in PyTorch: our lean module, and the official code's way, for comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..arrays import Float32
from ..bundle import JOINT_ENCODER, BundleManifest, ModelSizes
from ..engines.contract import Batch
from .random_model import write_checkpoint

Weights = dict[str, Tensor]
EPSILON = 1e-12
PARTS = ("query", "key", "value")
HEAD = "classification_head"


@dataclass(frozen=True, slots=True)
class Scorer:
    """A joint encoder as a function of tensors.

    Attributes:
        embeddings, head: the bundle's tensors by their names in its graph.
        layers: one mapping for every layer; matrices as `functional.linear` takes them.
        sizes: of the model.
        layer, last_layer: what runs a layer; compiled or as they stand.
    """

    embeddings: Weights
    layers: list[Weights]
    head: Weights
    sizes: ModelSizes
    layer: Callable[..., Any]
    last_layer: Callable[..., Any]

    def __call__(self, text_ids: Tensor, query_of_pair: Tensor, visual_tokens: Tensor) -> Tensor:
        """Return `scores` float32 [P], the raw logits.

        Args:
            text_ids: int32 [Q, T]: `[CLS] wordpieces [SEP]` of exactly T ids each.
            query_of_pair: int32 [P]: which query each pair asks.
            visual_tokens: float16 [P, m, H].
        """
        x = self._embed(text_ids, query_of_pair, visual_tokens)
        for weights in self.layers[:-1]:
            x = self.layer(x, weights)
        cls = self.last_layer(x, self.layers[-1])
        pooled = torch.tanh(_linear(cls, self.head, "pooler"))
        return _linear(pooled, self.head, "classifier").squeeze(-1).float()

    def _embed(self, text_ids: Tensor, query_of_pair: Tensor, visual_tokens: Tensor) -> Tensor:
        """Return the first layer's input [P, T + m + 1, H]."""
        table = self.embeddings
        num_queries, slots = text_ids.shape
        positions = table["position.weight"]
        text = table["word.weight"].index_select(0, text_ids.flatten())
        text = text.view(num_queries, slots, -1) + positions[:slots] + table["text_type.weight"]
        tail = positions[slots : slots + self.sizes.num_tokens + 1] + table["tail_type.weight"]
        visual = visual_tokens.to(tail.dtype) + tail[:-1]
        sep = (tail[-1] + table["sep.weight"]).expand(len(visual), 1, -1)
        whole = torch.cat([text.index_select(0, query_of_pair), visual, sep], dim=1)
        return _norm(whole, table, "norm")


def load_scorer(
    bundle: Path, *, device: str = "cpu", dtype: str = "float32", compiled: bool = False
) -> Scorer:
    """Return the scorer of a bundle folder, its weights read from the bundle's float32 graph.

    Args:
        device, dtype: PyTorch's names.
        compiled: run the layers through `torch.compile`, for every shape anew.

    Raises:
        CheckpointError: `bundle` is no model bundle.
    """
    sizes = BundleManifest.read(bundle).sizes
    tensors = {
        name: torch.from_numpy(value).to(device, getattr(torch, dtype))
        for name, value in _initializers(bundle / JOINT_ENCODER).items()
    }
    layers = [_layer_weights(_below(tensors, f"layers.{i}.")) for i in range(sizes.num_layers)]
    layer: Callable[..., Any] = partial(_run_layer, num_heads=sizes.num_heads)
    last: Callable[..., Any] = partial(_run_last_layer, num_heads=sizes.num_heads)
    if compiled:
        from torch._dynamo import config

        config.recompile_limit = 256  # a kernel for every shape: it would stop after eight
        config.accumulated_recompile_limit = 1024
        layer, last = torch.compile(layer, dynamic=False), torch.compile(last, dynamic=False)
    head = {
        name: _for_linear(name, value)
        for name, value in tensors.items()
        if name.startswith(("pooler.", "classifier."))
    }
    return Scorer(_below(tensors, "embeddings."), layers, head, sizes, layer, last)


def _run_layer(x: Tensor, weights: Weights, num_heads: int) -> Tensor:
    """Return [P, S, H] for `x` [P, S, H]."""
    qkv = functional.linear(x, weights["qkv.weight"], weights["qkv.bias"])
    query, key, value = (_heads(part, num_heads) for part in qkv.chunk(3, dim=-1))
    return _after_attention(x, query, key, value, weights)


def _run_last_layer(x: Tensor, weights: Weights, num_heads: int) -> Tensor:
    """Return [P, H], the CLS rows, for `x` [P, S, H]."""
    hidden = x.shape[-1]
    matrix, bias = weights["qkv.weight"], weights["qkv.bias"]
    cls = x[:, :1]
    query = _heads(functional.linear(cls, matrix[:hidden], bias[:hidden]), num_heads)
    both = functional.linear(x, matrix[hidden:], bias[hidden:])
    key, value = (_heads(part, num_heads) for part in both.chunk(2, dim=-1))
    return _after_attention(cls, query, key, value, weights)[:, 0]


def _after_attention(
    rows: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Weights
) -> Tensor:
    # The bundle's graph holds query weights that are scaled already.
    context = functional.scaled_dot_product_attention(query, key, value, scale=1.0)
    context = context.transpose(1, 2).flatten(2)
    rows = _norm(rows + _linear(context, weights, "attention_output"), weights, "attention_norm")
    inner = functional.gelu(_linear(rows, weights, "ffn1"))
    return _norm(rows + _linear(inner, weights, "ffn2"), weights, "ffn_norm")


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """Return [P, heads, S, d] for [P, S, H]."""
    return x.view(*x.shape[:-1], num_heads, -1).transpose(1, 2)


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    scale = weights[f"{name}.weight"]
    return functional.layer_norm(x, scale.shape, scale, weights[f"{name}.bias"], EPSILON)


def _initializers(graph: Path) -> dict[str, Any]:
    """Return the float32 tensors of an ONNX graph by name, copied."""
    import onnx
    from onnx import numpy_helper

    tensors = onnx.load(graph).graph.initializer
    return {
        tensor.name: np.array(numpy_helper.to_array(tensor))
        for tensor in tensors
        if tensor.data_type == onnx.TensorProto.FLOAT and not tensor.name.startswith("const.")
    }


def _layer_weights(weights: Weights) -> Weights:
    """Return a layer's tensors with query, key and value in one."""
    rest = {
        name: _for_linear(name, value)
        for name, value in weights.items()
        if name.partition(".")[0] not in PARTS
    }
    return {
        **rest,
        "qkv.weight": torch.cat([weights[f"{part}.weight"].t() for part in PARTS]),
        "qkv.bias": torch.cat([weights[f"{part}.bias"] for part in PARTS]),
    }


def _for_linear(name: str, value: Tensor) -> Tensor:
    """Return matrices as [out, in]; the graph holds [in, out]."""
    return value.t().contiguous() if name.endswith(".weight") and value.ndim == 2 else value


def _below(tensors: Mapping[str, Tensor], prefix: str) -> Weights:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


class JointEncoder(torch.nn.Module):
    """`scores` float32 [P] of one query's pairs by Hugging Face's BERT and the official head.

    The official code runs BERT with its head for masked words, a product with 30,523 columns at
    every position, and keeps the states of every layer; `trimmed` does neither. A batch holds one
    query's pairs, as in the official evaluation, so neither pads anything.
    """

    def __init__(
        self,
        bert: Any,
        dense: torch.nn.Linear,
        classifier: torch.nn.Linear,
        *,
        trimmed: bool = False,
    ):
        super().__init__()
        self.bert: Any = bert
        self.dense, self.classifier, self.trimmed = dense, classifier, trimmed

    def forward(self, text_ids: Tensor, visual_tokens: Tensor) -> Tensor:
        """Score `[CLS] text [SEP]` int64 [1, T] with visual tokens float [P, m, H]."""
        words = self.bert.get_input_embeddings().weight
        text = words[text_ids[0]]
        num_pairs = visual_tokens.shape[0]
        visual = visual_tokens.to(words.dtype)
        sides = [text.expand(num_pairs, -1, -1), visual, text[-1].expand(num_pairs, 1, -1)]
        ones = torch.ones_like(visual_tokens[:1, :, 0], dtype=torch.long)
        types = torch.cat([torch.zeros_like(text_ids), ones, ones[:, :1]], dim=1)
        types = types.expand(num_pairs, -1)
        inputs = {
            "inputs_embeds": torch.cat(sides, dim=1),
            "token_type_ids": types,
            "attention_mask": torch.ones_like(types),
        }
        if self.trimmed:
            states = self.bert(**inputs).last_hidden_state
        else:
            states = self.bert(**inputs, output_hidden_states=True).hidden_states[-1]
        pooled = torch.tanh(self.dense(states[:, 0]))
        scores: Tensor = self.classifier(pooled).squeeze(-1).float()
        return scores

    def as_trimmed(self) -> JointEncoder:
        """Return the same encoder, its weights shared, without what is thrown away."""
        return JointEncoder(self.bert.bert, self.dense, self.classifier, trimmed=True).eval()


def load_official() -> JointEncoder:
    """Return the official encoder with the random model's weights: float32, for evaluation."""
    from transformers import BertConfig, BertForMaskedLM

    with TemporaryDirectory() as scratch:
        checkpoint, language_model = write_checkpoint(Path(scratch))
        state: Weights = torch.load(checkpoint, weights_only=True)["model"]
        config = BertConfig.from_pretrained(language_model)
    config.vocab_size += 1  # `<image>`
    bert = BertForMaskedLM(config)  # its own head stays random: what it computes is thrown away
    bert.bert.load_state_dict(_below(state, "language_model.bert."))
    dense, classifier = (_module(state, f"{HEAD}.{index}") for index in ("0.dense", "1"))
    return JointEncoder(bert, dense, classifier).eval()


def _module(state: Weights, name: str) -> torch.nn.Linear:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    module = torch.nn.Linear(weight.shape[1], weight.shape[0])
    module.load_state_dict({"weight": weight, "bias": bias})
    return module


def official_scorer(
    num_threads: int | None = None, *, device: str = "cpu", dtype: str = "float32"
) -> Callable[[Batch], Float32]:
    """Return the function that scores a batch of one query with the random model's weights.

    Evaluation mode, no gradients, PyTorch's own number of threads unless told; `device` and
    `dtype` are PyTorch's names. `visual_tokens` may be a tensor on the device already.
    """
    encoder = load_official().to(device, getattr(torch, dtype))
    if num_threads is not None:
        torch.set_num_threads(num_threads)

    def score(batch: Batch) -> Float32:
        length = int(batch.text_length[0])
        ids = torch.from_numpy(batch.text_ids[:, :length].astype(np.int64))
        with torch.inference_mode():
            tokens = torch.as_tensor(batch.visual_tokens).to(device)
            scores: Float32 = encoder(ids.to(device), tokens).cpu().numpy()
            return scores

    return score
