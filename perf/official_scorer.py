"""The scorer as the official evaluation runs it: Hugging Face's BertForMaskedLM in PyTorch.

Source: `compute_logits` of the official code. It asks the masked-language model for all hidden
states (so the vocabulary head runs over every slot, unused), then pooler and classifier.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from ..engines.contract import Batch, Float32
from .random_model import write_checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import BertForMaskedLM

    State = dict[str, torch.Tensor]

HEAD = "classification_head"


def official_scorer(
    num_threads: int | None = None, *, device: str = "cpu", dtype: str = "float32"
) -> Callable[[Batch], Float32]:
    """Return the function that scores a batch of one query with the random model's weights.

    Evaluation mode, no gradients, PyTorch's own number of threads unless told; `device` and
    `dtype` are PyTorch's names. As in the official evaluation, a batch is one caption with its
    candidates, so nothing is padded. `visual_tokens` may be a tensor on the device already.
    """
    import torch

    with TemporaryDirectory() as scratch:
        checkpoint, language_model = write_checkpoint(Path(scratch))
        state: State = torch.load(checkpoint, weights_only=True)["model"]
        bert = _bert(state, language_model).to(device, getattr(torch, dtype))
        head = {name: state[name].to(device, bert.dtype) for name in state if HEAD in name}
    if num_threads is not None:
        torch.set_num_threads(num_threads)

    def score(batch: Batch) -> Float32:
        with torch.inference_mode():
            inputs = _inputs(batch, bert)
            states = bert(**inputs, output_hidden_states=True).hidden_states
            pooled = torch.tanh(_linear(states[-1][:, 0], head, f"{HEAD}.0.dense"))
            logits: Float32 = _linear(pooled, head, f"{HEAD}.1").squeeze(-1).float().cpu().numpy()
            return logits

    return score


def _bert(state: State, language_model: Path) -> BertForMaskedLM:
    """Return the language model with the checkpoint's body; its unused head stays random."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig.from_pretrained(language_model)
    config.vocab_size += 1  # `<image>`
    model = BertForMaskedLM(config).eval()
    prefix = "language_model.bert."
    body = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    model.bert.load_state_dict(body)
    return model


def _inputs(batch: Batch, bert: BertForMaskedLM) -> dict[str, torch.Tensor]:
    """Return embeddings, types and mask of `[CLS] text [SEP] <visual tokens> [SEP]`."""
    import torch

    words = bert.get_input_embeddings().weight
    length = int(batch.text_length[0])
    ids = torch.from_numpy(batch.text_ids[0, :length].astype(np.int64))
    text = words[ids.to(words.device)]
    visual = torch.as_tensor(batch.visual_tokens).to(words)
    num_pairs = len(visual)
    embeds = torch.cat(
        [text.expand(num_pairs, -1, -1), visual, text[-1].expand(num_pairs, 1, -1)], dim=1
    )
    types = torch.zeros(embeds.shape[:2], dtype=torch.long, device=words.device)
    types[:, length:] = 1
    return {
        "inputs_embeds": embeds,
        "token_type_ids": types,
        "attention_mask": torch.ones_like(types),
    }


def _linear(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    import torch

    return torch.nn.functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])
