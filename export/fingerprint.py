"""Hashes of what a model computes: over tensor names, shapes and values, never file bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def fingerprint(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) over `settings` and the sorted (name, shape, float32 values).

    Values are hashed as little-endian float32, so a checkpoint and its bfloat16 twin with the
    same values, in either spelling of the vision keys, have one fingerprint.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(tensors):
        values = tensors[name].detach().float().contiguous().numpy().astype("<f4", copy=False)
        digest.update(f"\n{name} {list(values.shape)}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
