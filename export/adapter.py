"""The adapter in plain PyTorch: N features of an image -> m visual tokens. The reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .activations import activation
from .checkpoint import Checkpoint
from .joint_encoder import split_heads


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Sizes of the adapter: D `features` in, `num_tokens` x `hidden` out."""

    feature_dim: int
    num_heads: int
    num_tokens: int
    intermediate: int
    hidden: int
    layer_norm_eps: float
    activation: str


class Adapter(nn.Module):
    """Learned queries attend to an image's features; a residual MLP and a projection follow.

    Keys and values pass two linear maps each, as in the official code; the queries pass one.

    Source: EDJE paper, equations 1-4; official `token_compression.py`.
    """

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        dim = config.feature_dim
        self.query = nn.Parameter(torch.zeros(config.num_tokens, dim))
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.attention_query = nn.Linear(dim, dim)
        self.attention_key = nn.Linear(dim, dim)
        self.attention_value = nn.Linear(dim, dim)
        self.attention_output = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.ffn1 = nn.Linear(dim, config.intermediate)
        self.ffn2 = nn.Linear(config.intermediate, dim)
        self.projection = nn.Linear(dim, config.hidden)
        self.activation = activation(config.activation)

    def forward(self, features: Tensor) -> Tensor:
        """Return visual tokens float32 [B, m, H] of `features` float32 [B, N, D]."""
        heads = self.config.num_heads
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
    sizes, tensors = checkpoint.sizes, checkpoint.adapter
    config = AdapterConfig(
        feature_dim=sizes.feature_dim,
        num_heads=num_heads,
        num_tokens=sizes.num_tokens,
        intermediate=sizes.adapter_intermediate,
        hidden=sizes.hidden,
        layer_norm_eps=layer_norm_eps,
        activation=activation,
    )
    state = {"query": tensors["query"][0]}
    for kind in ("weight", "bias"):
        state |= {f"{ours}.{kind}": tensors[f"{name}.{kind}"] for name, ours in OFFICIAL.items()}
        joined = tensors[f"attention.in_proj_{kind}"]  # query, key, value maps, stacked
        for name, part in zip(("query", "key", "value"), joined.chunk(3), strict=True):
            state[f"attention_{name}.{kind}"] = part
    adapter = Adapter(config)
    adapter.load_state_dict(state)
    return adapter.eval()
