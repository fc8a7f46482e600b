"""The image encoder in PyTorch: transformers' SigLIP vision tower, then the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter


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


def load_tower(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return transformers' `SiglipVisionModel` with `tensors` in place of its random weights.

    Args:
        settings: the `vision_config` of the Hugging Face folder.
        tensors: checked tensors, named without `vision_encoder.` and `vision_model.`.
    """
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(**{**settings, "vision_use_head": False})
    with torch.device("meta"):  # no memory and no random weights: both come with `tensors`
        tower: nn.Module = SiglipVisionModel(config).eval()
    inner = "vision_model." if hasattr(tower, "vision_model") else ""  # transformers 4 nests it
    tower.load_state_dict({inner + name: value for name, value in tensors.items()}, assign=True)
    embeddings = tower.get_submodule(f"{inner}embeddings")
    positions = len(tensors["embeddings.position_embedding.weight"])
    embeddings.position_ids = torch.arange(positions)[None]  # not in a checkpoint
    return tower
