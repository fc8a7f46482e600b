"""The networks as they are trained: official tensor names, plus heads thrown away later."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertForMaskedLM, SiglipModel

from .. import scenes, tiny_model
from ..tiny_model import HIDDEN, NUM_TOKENS
from .data import IMAGE_ID, SEP, Uint8, normalized


class Adapter(nn.Module):
    """The token-compression adapter with the official tensor names, before any folding."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, NUM_TOKENS, HIDDEN))
        self.key = nn.Linear(HIDDEN, HIDDEN)
        self.value = nn.Linear(HIDDEN, HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)
        self.layernorm = nn.LayerNorm(HIDDEN, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(HIDDEN, tiny_model.ADAPTER_INTERMEDIATE),
                "fc2": nn.Linear(tiny_model.ADAPTER_INTERMEDIATE, HIDDEN),
            }
        )
        self.projection = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        query = self.query.expand(len(features), -1, -1)
        keys, values = self.key(features), self.value(features)
        attended, _ = self.attention(query, keys, values, need_weights=False)
        hidden = F.gelu(self.mlp["fc1"](self.layernorm(attended)))
        return self.projection(attended + self.mlp["fc2"](hidden))  # type: ignore[no-any-return]


class DenseHead(nn.Module):
    """Reads what lies under a square (colour, shape, size), its place, and the background."""

    SPLITS = (len(scenes.COLORS) + 1, len(scenes.SHAPES), len(scenes.SIZES), 3, 9, 9)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, sum(self.SPLITS))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """tokens [B, n, H], labels int [B, n, 6] with -100 where nothing is asked."""
        parts = self.linear(tokens).split(self.SPLITS, dim=-1)
        losses = [
            F.cross_entropy(part.flatten(0, 1), labels[..., i].flatten())
            for i, part in enumerate(parts)
        ]
        return torch.stack(losses).sum()


class Joint(nn.Module):
    """The joint encoder with its matching head, and the heads that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        config = tiny_model.bert_config()
        self.language_model = BertForMaskedLM(config)
        self.language_model.resize_token_embeddings(IMAGE_ID + 1, mean_resizing=False)
        self.pooler = nn.Linear(HIDDEN, HIDDEN)
        self.classifier = nn.Linear(HIDDEN, 1)
        self.false_word = nn.Linear(HIDDEN, 1)
        self.place = nn.Linear(HIDDEN, 9)

    def encode(
        self, ids: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [B, L, H] half-way and last; `tokens` [B, 64, H] replace `<image>`."""
        embeddings = self.language_model.get_input_embeddings()(ids)
        image = (ids == IMAGE_ID).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(image, tokens.to(embeddings.dtype))
        first = ((ids == IMAGE_ID) | (ids == SEP)).int().cumsum(1)
        types = ((first > 1) & mask.bool()).long()
        states = self.language_model.bert(
            inputs_embeds=embeddings,
            attention_mask=mask,
            token_type_ids=types,
            output_hidden_states=True,
        ).hidden_states
        return states[len(states) // 2], states[-1]

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """Matching logits [B] from the CLS place."""
        pooled = torch.tanh(self.pooler(hidden[:, 0]))
        return self.classifier(pooled).squeeze(-1)  # type: ignore[no-any-return]


class Tower(nn.Module):
    """First stage (vision and text towers) and adapter, with the dense heads of training."""

    def __init__(self) -> None:
        super().__init__()
        self.siglip = SiglipModel(tiny_model.siglip_config())
        nn.init.constant_(self.siglip.logit_scale, np.log(10.0))
        nn.init.constant_(self.siglip.logit_bias, -10.0)
        self.adapter = Adapter()
        self.head_tower, self.head_tokens = DenseHead(), DenseHead()

    def images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, 81, H] and unit embeddings [B, H]."""
        out = self.siglip.vision_model(pixel_values=pixels)
        return out.last_hidden_state, F.normalize(out.pooler_output, dim=-1)

    def texts(self, ids: torch.Tensor) -> torch.Tensor:
        """Unit embeddings [B, H]."""
        return F.normalize(self.siglip.text_model(input_ids=ids).pooler_output, dim=-1)

    @torch.no_grad()
    def tokens(self, pixels: Uint8, batch: int = 200) -> npt.NDArray[np.float16]:
        """float16 [N, 64, H], as a store holds them."""
        parts = [
            self.adapter(self.images(normalized(pixels[i : i + batch]))[0]).half().numpy()
            for i in range(0, len(pixels), batch)
        ]
        return np.concatenate(parts)
