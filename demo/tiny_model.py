"""The demo's tiny model: its sizes and Hugging Face folders, and its trained weights."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
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

IMAGE_SIZE = 72
PATCH = 8
GRID = IMAGE_SIZE // PATCH
HIDDEN = 128
NUM_TOKENS = 64
ADAPTER_INTERMEDIATE = 512
MAX_FIRST_STAGE_TEXT = 32
WORDS = ("a", "on", "of", "left", "right", "above", "below", "background")
# The image processor's settings as SigLIP2 folders hold them (bilinear).
PREPROCESSOR = {
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
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


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


def write_checkpoint(folder: Path) -> tuple[Path, Path, Path]:
    """Write what `edje export` is given; return it.

    A checkpoint, and the Hugging Face folders of the language model and of the vision model.
    """
    checkpoint, language, vision = (
        folder / name for name in ("checkpoint.pth", "language_model", "vision_model")
    )
    language.mkdir(parents=True, exist_ok=True)
    vision.mkdir(exist_ok=True)
    _write_json(
        language / "config.json",
        {**bert_config().to_dict(), "architectures": ["BertForMaskedLM"]},
    )
    make_tokenizer().save(str(language / "tokenizer.json"))
    (language / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    _write_json(
        vision / "config.json",
        {**siglip_config().to_dict(), "architectures": ["SiglipModel"]},
    )
    _write_json(vision / "preprocessor_config.json", PREPROCESSOR)
    torch.save({"model": official_layout(load()), "epoch": 0, "global_step": 0}, checkpoint)
    return checkpoint, language, vision


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
