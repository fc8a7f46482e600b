"""Triton sources of `top_k`: the k best of P scores, sorted.

A score and its place make one 64-bit key: keys are unique, so that any sorting network keeps the
candidates' order among ties. `top_k_blocks` keeps the best of every block, `top_k_merge` merges
them one after the other. The reference is `references.top_k`.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-(2**63))
NAN_BITS = tl.constexpr(-(2**31))
LOW_BITS = tl.constexpr(2**32 - 1)


@triton.jit
def top_k_blocks(
    scores: tl.tensor, keys: tl.tensor, num_scores: tl.int32, BLOCK: tl.constexpr, K: tl.constexpr
) -> None:
    """Write the `K` best keys of every `BLOCK` scores, largest first, to `keys` [blocks, K]."""
    block = tl.program_id(0)
    places = block * BLOCK + tl.arange(0, BLOCK)
    is_real = places < num_scores
    found = tl.load(scores + places, mask=is_real, other=0.0)
    best = tl.topk(tl.where(is_real, _keys(found, places), NO_KEY), K)
    tl.store(keys + block * K + tl.arange(0, K), best)


@triton.jit
def top_k_merge(
    scores: tl.tensor,
    keys: tl.tensor,
    indices: tl.tensor,
    values: tl.tensor,
    num_blocks: tl.int32,
    k: tl.int32,
    K: tl.constexpr,
) -> None:
    """Merge `keys` [num_blocks, K] into the first `k` places and scores; one program."""
    lanes = tl.arange(0, K)
    best = tl.load(keys + lanes)
    for block in range(1, num_blocks):
        # Of one list and the other reversed, the larger ones are the best K, and bitonic.
        other = tl.load(keys + block * K + (K - 1 - lanes))
        best = tl.bitonic_merge(tl.maximum(best, other), descending=True)
    is_asked = lanes < k
    places = ~best.to(tl.int32)
    tl.store(indices + lanes, places, mask=is_asked)
    is_real = is_asked & (best != NO_KEY)
    tl.store(values + lanes, tl.load(scores + places, mask=is_real), mask=is_real)


@triton.jit
def _keys(scores: tl.tensor, places: tl.tensor) -> tl.tensor:
    bits = tl.where(scores == 0.0, 0, scores.to(tl.int32, bitcast=True))  # -0.0 ties with 0.0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers they order as the scores do
    bits = tl.where(scores != scores, NAN_BITS, bits)
    # Below them the complement of the place: of equal scores the first has the largest key.
    return (bits.to(tl.int64) << 32) | ((~places).to(tl.int64) & LOW_BITS)
