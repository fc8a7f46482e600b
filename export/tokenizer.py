"""The bundle's `tokenizer.json`, from the language model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the wordpiece tokenizer of a Hugging Face folder, with no truncation or padding set.

    Reads `tokenizer.json`, or builds BERT's tokenizer from `vocab.txt` where only that exists.

    Raises:
        CheckpointError: neither file is there, or the file is not a tokenizer.
    """
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    fast, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
    if not fast.exists() and not vocabulary.exists():
        raise CheckpointError(
            f"{folder} holds no tokenizer: expected tokenizer.json or vocab.txt",
            hint="pass --language-model the Hugging Face folder of the language model",
        )
    try:
        if fast.exists():
            tokenizer = Tokenizer.from_file(str(fast))
        else:
            built = BertWordPieceTokenizer(str(vocabulary), lowercase=_lowercase(folder))
            tokenizer = Tokenizer.from_str(built.to_str())
    except Exception as error:  # `tokenizers` raises bare Exception on a bad file
        raise CheckpointError(f"cannot read the tokenizer in {folder}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _lowercase(folder: Path) -> bool:
    """Return `do_lower_case`, true where nothing tells it (the uncased models)."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return True
    return bool(json.loads(path.read_text(encoding="utf-8")).get("do_lower_case", True))
