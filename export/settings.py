"""Settings of a Hugging Face folder: one JSON object a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def read_settings(path: Path, option: str) -> dict[str, Any]:
    """Return the object that a JSON file holds; `option` of the command line named its folder.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path}: {error}",
            hint=f"pass {option} a Hugging Face model folder (config.json and its files)",
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds {type(values).__name__}, expected an object",
            hint=f"pass {option} a Hugging Face model folder as transformers saves it",
        )
    return values
