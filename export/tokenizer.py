"""The bundle's `tokenizer.json`, from the language model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the wordpiece tokenizer of a Hugging Face folder, with no truncation or padding set.

    transformers reads it, as it did in training: `tokenizer.json` or `vocab.txt`, and what
    `tokenizer_config.json` changes of them (lower case, accents, added tokens).

    Raises:
        CheckpointError: the folder holds no tokenizer that can be saved as `tokenizer.json`.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, BertConfig

    try:
        read = AutoTokenizer.from_pretrained(
            str(folder),
            config=BertConfig(),  # the class, where neither file tells it
            local_files_only=True,
            trust_remote_code=False,
        )
        tokenizer = Tokenizer.from_str(read.backend_tokenizer.to_str())
    except Exception as error:  # transformers and `tokenizers` raise all kinds on a bad file
        cause = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(
            f"cannot read the tokenizer in {folder}: {cause}",
            hint="pass --language-model the Hugging Face folder of the language model",
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
