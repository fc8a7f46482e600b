"""Triton source of `attention`: softmax(Q K^T) V of each pair and head, keys by text length.

Scores and sums are float32 and never leave the chip; weights, relative to the query's largest
score, are rounded to the type of the values, as every engine does. The reference is
`layer_references.attention`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Below every score, and no infinity: two of those have no difference.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def attention(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    lengths: tl.tensor,
    control: tl.tensor,
    query_stride: tl.int32,
    query_pair_stride: tl.int32,
    key_stride: tl.int32,
    out_stride: tl.int32,
    num_queries: tl.int32,
    num_slots: tl.int32,
    text_slots: tl.int32,
    num_heads: tl.int32,
    HEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    """Compute `BLOCK_Q` queries of one head of one pair; the queries are scaled already.

    Of the pair's `num_slots` keys those at `lengths[pair]` to `text_slots` are padding: their keys
    and values are not read. With a `TAIL` there are more than `BLOCK_KEYS` of them and at most as
    many as both, and all are weighed at once; without (0) any number, block by block.
    """
    blocks = tl.cdiv(num_queries, BLOCK_Q)
    part = tl.program_id(0)
    pair = (part // (blocks * num_heads)).to(tl.int64)
    head = part // blocks % num_heads
    if pair < tl.load(control + 1):
        lanes = tl.arange(0, HEAD)
        places = part % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
        is_query = (places < num_queries)[:, None]
        query = queries + pair * query_pair_stride + head * HEAD
        query += places[:, None] * query_stride + lanes[None, :]
        q = tl.load(query, mask=is_query, other=0.0)
        first = pair * num_slots * key_stride + head * HEAD
        length = tl.load(lengths + pair)

        where = (key_stride, length, text_slots, num_slots)
        if TAIL:
            total, weight = _at_once(q, keys + first, values + first, where, BLOCK_KEYS, TAIL)
        else:
            total, weight = _by_blocks(q, keys + first, values + first, where, BLOCK_KEYS)
        total = total / weight[:, None]
        target = out + (pair * num_queries + places)[:, None] * out_stride + head * HEAD
        tl.store(target + lanes[None, :], total.to(out.dtype.element_ty), mask=is_query)


@triton.jit
def _at_once(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    where: tl.tuple,
    BLOCK_KEYS: tl.constexpr,
    TAIL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the sums of weighted values and of weights, relative to the largest score."""
    slots, tail = tl.arange(0, BLOCK_KEYS), BLOCK_KEYS + tl.arange(0, TAIL)
    # All loads come first: the tail's are under way while the first block is worked on.
    k_tail, v_tail, is_tail = _loaded(keys, values, tail, where, q.shape[1])
    k, v, is_real = _loaded(keys, values, slots, where, q.shape[1])
    scores, tail_scores = _scored(q, k, is_real), _scored(q, k_tail, is_tail)
    most = tl.maximum(tl.max(scores, axis=1), tl.max(tail_scores, axis=1))
    weights = tl.exp2(scores - most[:, None])
    tail_weights = tl.exp2(tail_scores - most[:, None])
    total = tl.dot(weights.to(v.dtype), v)
    total = tl.dot(tail_weights.to(v.dtype), v_tail, total)
    return total, tl.sum(weights, axis=1) + tl.sum(tail_weights, axis=1)


@triton.jit
def _by_blocks(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    where: tl.tuple,
    BLOCK_KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return as `_at_once`; weights are rounded relative to the largest score so far."""
    total = tl.zeros(q.shape, tl.float32)
    weight = tl.zeros((q.shape[0],), tl.float32)
    most = tl.full((q.shape[0],), LOWEST, tl.float32)
    for start in range(0, where[3], BLOCK_KEYS):
        slots = start + tl.arange(0, BLOCK_KEYS)
        k, v, is_real = _loaded(keys, values, slots, where, q.shape[1])
        scores = _scored(q, k, is_real)
        higher = tl.maximum(most, tl.max(scores, axis=1))
        factor = tl.exp2(most - higher)
        weights = tl.exp2(scores - higher[:, None])
        weight = weight * factor + tl.sum(weights, axis=1)
        total = tl.dot(weights.to(v.dtype), v, total * factor[:, None])
        most = higher
    return total, weight


@triton.jit
def _loaded(
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    where: tl.tuple,
    HEAD: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return keys [HEAD, block], values [block, HEAD], zeros if not real, and which are real."""
    key_stride, length, text_slots, num_slots = where
    is_real = ((slots < length) | (slots >= text_slots)) & (slots < num_slots)
    cells, lanes = slots * key_stride, tl.arange(0, HEAD)
    k = tl.load(keys + cells[None, :] + lanes[:, None], mask=is_real[None, :], other=0.0)
    v = tl.load(values + cells[:, None] + lanes[None, :], mask=is_real[:, None], other=0.0)
    return k, v, is_real


@triton.jit
def _scored(q: tl.tensor, k: tl.tensor, is_real: tl.tensor) -> tl.tensor:
    """Return scores for powers of two, -inf of keys that are not real."""
    return tl.where(is_real[None, :], tl.dot(q, k) * LOG2_E, float("-inf"))
