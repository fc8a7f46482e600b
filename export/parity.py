"""Every exported graph against its PyTorch reference, on seeded inputs: `parity.json`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..arrays import Array
from ..errors import CheckpointError
from ..machine import thread_limit
from .configs import LanguageConfig

SEED = 20251
MAX_DIFFERENCE = 1e-3  # of the largest output; float16 outputs are rounded by half of that
SCORER_SHAPES = ((1, 16, 1), (1, 24, 3), (3, 32, 5), (4, 63, 2))  # (Q, T, P)

Feeds = Iterator[dict[str, Array]]


def check_parity(path: Path, reference: nn.Module, feeds: Feeds) -> dict[str, Any]:
    """Run the graph at `path` and the reference on `feeds`; return the largest difference.

    Raises:
        CheckpointError: the difference exceeds `MAX_DIFFERENCE` of the largest output.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_limit(sees_affinity=False) or 0  # 0: all cores
    if (num_threads := thread_limit(sees_affinity=True)) is not None:
        torch.set_num_threads(num_threads)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    difference, scale, shapes = 0.0, 0.0, []
    for feed in feeds:
        (got,) = session.run(None, feed)
        with torch.inference_mode():
            want = reference(*map(torch.from_numpy, feed.values())).numpy()
        # np.maximum, unlike max(), keeps a NaN
        difference = float(np.maximum(difference, np.abs(got.astype(np.float32) - want).max()))
        scale = max(scale, float(np.abs(want).max()))
        shapes.append({name: list(value.shape) for name, value in feed.items()})
    limit = MAX_DIFFERENCE * max(scale, 1.0)
    if not difference <= limit:
        raise CheckpointError(
            f"{path.name} differs from PyTorch by {difference:.2e} on outputs up to {scale:.2e}, "
            f"expected at most {limit:.2e}; nothing was written"
        )
    return {
        "max_abs_difference": difference,
        "limit": limit,
        "max_abs_output": scale,
        "output_dtype": str(got.dtype),
        "runtime": f"onnxruntime {onnxruntime.__version__}, CPU, float32",
        "seed": SEED,
        "inputs": shapes,
    }


def scorer_feeds(config: LanguageConfig, num_tokens: int) -> Feeds:
    """Yield inputs of the joint encoder: mixed queries of every length that fits."""
    rng = np.random.default_rng(SEED)
    for num_queries, slots, num_pairs in SCORER_SHAPES:
        longest = min(slots, config.max_positions - num_tokens - 1)
        lengths = rng.integers(3, longest + 1, num_queries).astype(np.int32)
        ids = rng.integers(0, config.vocab_size, (num_queries, slots)).astype(np.int32)
        ids[:, 0] = config.cls_id
        for row, length in zip(ids, lengths, strict=True):
            row[length - 1] = config.sep_id
            row[length:] = 0
        tokens = rng.standard_normal((num_pairs, num_tokens, config.hidden))
        yield {
            "text_ids": ids,
            "text_length": lengths,
            "query_of_pair": rng.integers(0, num_queries, num_pairs).astype(np.int32),
            "visual_tokens": tokens.astype(np.float16),
        }


def adapter_feeds(num_features: int, feature_dim: int) -> Feeds:
    """Yield features of one and of three images."""
    rng = np.random.default_rng(SEED)
    for batch in (1, 3):
        features = rng.standard_normal((batch, num_features, feature_dim))
        yield {"features": features.astype(np.float32)}


def image_feeds(size: int) -> Feeds:
    """Yield pixels of two images of noise (one batch: a large tower takes seconds an image)."""
    rng = np.random.default_rng(SEED)
    yield {"pixels": rng.uniform(-1, 1, (2, 3, size, size)).astype(np.float32)}
