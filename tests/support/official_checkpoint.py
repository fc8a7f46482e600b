"""Random checkpoints in the layout of the official training script, of any size.

Tensor names and shapes come from transformers' own BertForMaskedLM and SiglipModel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, SiglipConfig, SiglipModel

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
State = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a random checkpoint; the defaults are odd on purpose."""

    hidden: int = 24
    num_layers: int = 3
    num_heads: int = 3
    intermediate: int = 40
    num_words: int = 90
    max_positions: int = 512
    num_tokens: int = 16
    feature_dim: int = 20
    vision_layers: int = 2
    vision_heads: int = 5
    vision_intermediate: int = 36
    adapter_intermediate: int = 28
    image_size: int = 24
    patch_size: int = 8
    text_activation: str = "gelu"
    vision_activation: str = "gelu_pytorch_tanh"


FULL_SIZE_SCORER = Sizes(
    hidden=384, num_layers=12, num_heads=12, intermediate=1536, num_words=30522, num_tokens=64
)


@dataclass(frozen=True)
class CheckpointFolders:
    """What `export_bundle` takes."""

    checkpoint: Path
    language_model: Path
    vision_model: Path


def bert_config(sizes: Sizes) -> BertConfig:
    return BertConfig(
        vocab_size=sizes.num_words,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        intermediate_size=sizes.intermediate,
        max_position_embeddings=sizes.max_positions,
        hidden_act=sizes.text_activation,
        architectures=["BertForMaskedLM"],
    )


def siglip_config(sizes: Sizes) -> SiglipConfig:
    vision = {
        "hidden_size": sizes.feature_dim,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.vision_heads,
        "intermediate_size": sizes.vision_intermediate,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "hidden_act": sizes.vision_activation,
    }
    text = {
        "hidden_size": sizes.feature_dim,
        "num_hidden_layers": 1,
        "num_attention_heads": sizes.vision_heads,
        "intermediate_size": 16,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "vocab_size": sizes.num_words,
    }
    return SiglipConfig(vision_config=vision, text_config=text)


def official_state(sizes: Sizes, *, seed: int = 0, spelling: int = 5) -> State:
    """Return a state dict with random values; `spelling` 4 or 5 is the transformers version."""
    bert = _shapes(lambda: BertForMaskedLM(bert_config(sizes)))
    rows = {
        name: (sizes.num_words + 1, *shape[1:]) if shape[0] == sizes.num_words else shape
        for name, shape in bert.items()
    }
    clip = _shapes(lambda: SiglipModel(siglip_config(sizes)))
    tower = {
        name.removeprefix("vision_model."): shape
        for name, shape in clip.items()
        if name.startswith("vision_model.")
    }
    prefix = "vision_encoder.vision_model." if spelling == 4 else "vision_encoder."
    shapes = {
        **{f"{prefix}{name}": shape for name, shape in tower.items()},
        **{f"language_model.{name}": shape for name, shape in rows.items()},
        **{f"vision_projection.{name}": shape for name, shape in _adapter(sizes).items()},
        "classification_head.0.dense.weight": (sizes.hidden, sizes.hidden),
        "classification_head.0.dense.bias": (sizes.hidden,),
        "classification_head.1.weight": (1, sizes.hidden),
        "classification_head.1.bias": (1,),
        "text_projection.weight": (sizes.feature_dim, sizes.hidden),
        "text_projection.bias": (sizes.feature_dim,),
        **{f"clip.{name}": shape for name, shape in clip.items()},
    }
    return _tied(_random(shapes, seed))


def write_checkpoint(
    folder: Path,
    sizes: Sizes | None = None,
    *,
    state: State | None = None,
    dtype: torch.dtype = torch.float32,
) -> CheckpointFolders:
    """Write checkpoint and Hugging Face folders as the official training leaves them."""
    sizes = sizes or Sizes()
    folders = CheckpointFolders(folder / "checkpoint_03.pth", folder / "lm", folder / "siglip")
    for path in (folders.language_model, folders.vision_model):
        path.mkdir(parents=True)
    state = official_state(sizes) if state is None else state
    model = {name: tensor.to(dtype) for name, tensor in state.items()}
    torch.save({"model": model, "config": {"epochs": 3}, "epoch": 3}, folders.checkpoint)
    words = [*SPECIALS, *(f"w{number}" for number in range(sizes.num_words - len(SPECIALS)))]
    tokenizer = BertWordPieceTokenizer({word: number for number, word in enumerate(words)})
    tokenizer.save(str(folders.language_model / "tokenizer.json"))
    bert_config(sizes).save_pretrained(folders.language_model)
    siglip_config(sizes).save_pretrained(folders.vision_model)
    side = {"height": sizes.image_size, "width": sizes.image_size}
    settings = {"size": side, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folders.vision_model / "preprocessor_config.json").write_text(json.dumps(settings))
    return folders


def _shapes(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = make().state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _adapter(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    dim, wide = sizes.feature_dim, sizes.adapter_intermediate
    maps = {"key": (dim, dim), "value": (dim, dim), "attention.out_proj": (dim, dim)}
    maps |= {"mlp.fc1": (wide, dim), "mlp.fc2": (dim, wide), "projection": (sizes.hidden, dim)}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": maps[name] for name in maps}
    shapes |= {f"{name}.bias": maps[name][:1] for name in maps}
    return shapes | {
        "query": (1, sizes.num_tokens, dim),
        "attention.in_proj_weight": (3 * dim, dim),
        "attention.in_proj_bias": (3 * dim,),
        "layernorm.weight": (dim,),
        "layernorm.bias": (dim,),
    }


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    """Draw weights that keep activations near 1 and attention sharp, so that pairs differ."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            state[name] = 1 + 0.2 * values
        elif len(shape) == 1:
            state[name] = 0.1 * values
        elif "embedding" in name and "patch" not in name:
            state[name] = 0.5 * values
        else:
            gain = 2.0 if re.search(r"self\.(query|key)\.", name) else 1.0
            state[name] = gain * values / values[0].numel() ** 0.5
    return state


def _tied(state: State) -> State:
    """Repeat what the official model shares."""
    words = state["language_model.bert.embeddings.word_embeddings.weight"]
    tied = {"text_embeddings.weight": words, "language_model.cls.predictions.decoder.weight": words}
    bias = state["language_model.cls.predictions.bias"]
    return state | tied | {"language_model.cls.predictions.decoder.bias": bias}
