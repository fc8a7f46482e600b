"""Triton source of `score`: the CLS row through pooler and classifier, in float32.

The reference is `references.score`.
"""

from __future__ import annotations

import triton
import triton.language as tl

TWO_LOG2_E = tl.constexpr(2.8853900817779268)


@triton.jit
def score(
    cls: tl.tensor,
    pooler_weight: tl.tensor,
    pooler_bias: tl.tensor,
    classifier_weight: tl.tensor,
    classifier_bias: tl.tensor,
    control: tl.tensor,
    width: tl.int32,
    PAIRS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
) -> None:
    """Store the scores of `PAIRS` pairs where `control[0]` says; `width` divides by the blocks."""
    num_pairs = tl.load(control + 1)
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    is_real = pairs < num_pairs
    inner = tl.arange(0, BLOCK_IN)
    scores = tl.zeros((PAIRS,), tl.float32)
    for first in range(0, width, BLOCK_OUT):
        columns = first + tl.arange(0, BLOCK_OUT)
        pooled = tl.zeros((PAIRS, BLOCK_OUT), tl.float32)
        for start in range(0, width, BLOCK_IN):
            row = cls + pairs[:, None] * width + (start + inner)[None, :]
            x = tl.load(row, mask=is_real[:, None], other=0.0).to(tl.float32)
            w = tl.load(pooler_weight + columns[None, :] * width + (start + inner)[:, None])
            pooled = tl.dot(x, w, pooled, input_precision="ieee")
        pooled += tl.load(pooler_bias + columns)[None, :]
        # tanh(x) = 1 - 2 / (1 + exp(2 x))
        pooled = 1.0 - 2.0 / (1.0 + tl.exp2(pooled * TWO_LOG2_E))
        scores += tl.sum(pooled * tl.load(classifier_weight + columns)[None, :], axis=1)
    scores += tl.load(classifier_bias)
    target = tl.load(control).to(tl.pointer_type(tl.float32))
    tl.store(target + pairs, scores, mask=is_real)
