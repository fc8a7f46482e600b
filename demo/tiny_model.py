"""The demo's tiny model: its sizes and Hugging Face folders, and its trained weights."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, SiglipConfig

from ..errors import CheckpointError
from . import scenes

MODEL = Path(__file__).parent / "model"
WEIGHTS = "model.safetensors"
CARD = "card.json"
EMBEDDINGS = "language_model.bert.embeddings.word_embeddings.weight"
DECODER = "language_model.cls.predictions.decoder"

State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class CheckpointPaths:
    """What `edje export` is given: the checkpoint and the two Hugging Face folders."""

    checkpoint: Path
    language_model: Path
    vision_model: Path


def packed(state: Mapping[str, torch.Tensor]) -> State:
    """Drop from an official state dict what `official_layout` can repeat."""
    repeated = ("text_embeddings.", "clip.vision_model.", f"{DECODER}.")
    return {k: v.contiguous() for k, v in state.items() if not k.startswith(repeated)}


def official_layout(state: State) -> State:
    """Add the tensors that the official layout holds a second time."""
    vision = {
        key.replace("vision_encoder.", "clip.vision_model.", 1): value
        for key, value in state.items()
        if key.startswith("vision_encoder.")
    }
    tied = {
        "text_embeddings.weight": state[EMBEDDINGS],
        f"{DECODER}.weight": state[EMBEDDINGS],
        f"{DECODER}.bias": state["language_model.cls.predictions.bias"],
    }
    return {**state, **vision, **tied}


def load() -> State:
    """Return the shipped tensors in float32, by official name.

    Raises:
        CheckpointError: the weights are not in this installation.
    """
    path = MODEL / WEIGHTS
    if not path.exists():
        raise CheckpointError(
            f"the demo's weights are missing: {path}",
            hint="clone the repository again, or train them: make train",
        )
    return {key: value.float() for key, value in load_file(path).items()}


def card() -> dict[str, Any]:
    """Return the model card's figures (recipe, seeds, steps, scores)."""
    figures: dict[str, Any] = json.loads((MODEL / CARD).read_text(encoding="utf-8"))
    return figures


def write_checkpoint(folder: Path) -> CheckpointPaths:
    """Write `checkpoint.pth`, `language_model/` and `vision_model/` into `folder`."""
    paths = CheckpointPaths(
        folder / "checkpoint.pth", folder / "language_model", folder / "vision_model"
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_language_model_folder(paths.language_model)
    write_vision_model_folder(paths.vision_model)
    state = {"model": official_layout(load()), "epoch": 0, "global_step": 0}
    torch.save(state, paths.checkpoint)
    return paths


IMAGE_SIZE = 72
PATCH = 8
GRID = IMAGE_SIZE // PATCH
HIDDEN = 128
NUM_TOKENS = 64
ADAPTER_INTERMEDIATE = 512
MAX_FIRST_STAGE_TEXT = 32
WORDS = ("a", "on", "of", "left", "right", "above", "below", "background")
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def vocabulary() -> list[str]:
    """Return every caption word, then letters and digits, so that any query has wordpieces."""
    words = [*WORDS, *scenes.SIZES, *scenes.COLORS, *scenes.SHAPES, *scenes.BACKGROUNDS]
    letters = [c for c in string.ascii_lowercase + string.digits if c not in words]
    pieces = [f"##{c}" for c in string.ascii_lowercase + string.digits]
    return [*SPECIALS, *words, *letters, *pieces]


def make_tokenizer() -> BertWordPieceTokenizer:
    """Return BERT's uncased wordpiece tokenizer over the scenes' vocabulary."""
    return BertWordPieceTokenizer({word: index for index, word in enumerate(vocabulary())})


def bert_config() -> BertConfig:
    """Return the joint encoder's configuration; its vocabulary excludes `<image>`."""
    return BertConfig(
        vocab_size=len(vocabulary()),
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=160,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
    )


def siglip_config() -> SiglipConfig:
    """Return the first stage's configuration: a vision tower and a text tower."""
    text = {
        "vocab_size": len(vocabulary()),
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_FIRST_STAGE_TEXT,
        "projection_size": HIDDEN,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    vision = {
        "hidden_size": HIDDEN,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
    }
    return SiglipConfig(text_config=text, vision_config=vision)


def preprocessor_config() -> dict[str, Any]:
    """Return the image processor's settings as SigLIP2 folders hold them (bilinear)."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
    }


def write_language_model_folder(folder: Path) -> None:
    """Write `config.json`, `tokenizer.json` and `vocab.txt` as a Hugging Face folder has them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = bert_config().to_dict()
    config["architectures"] = ["BertForMaskedLM"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")


def write_vision_model_folder(folder: Path) -> None:
    """Write `config.json` and `preprocessor_config.json` of the SigLIP folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = siglip_config().to_dict()
    config["architectures"] = ["SiglipModel"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor = json.dumps(preprocessor_config(), indent=2)
    (folder / "preprocessor_config.json").write_text(processor + "\n")
