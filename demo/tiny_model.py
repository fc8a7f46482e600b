"""The tiny EDJE model's shape: configurations, vocabulary and the official checkpoint layout.

Sizes are small, the layout is the official one: what exports this exports a full-size checkpoint.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, SiglipConfig

from . import scenes

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
