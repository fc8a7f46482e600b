"""Triton source of `attention`: softmax(Q K^T) V of each pair and head, keys by text length.

Scores and sums are float32 and never leave the chip; probabilities are rounded to the type of the
values, as every engine does. The reference is `references.attention`.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_KEYS = tl.constexpr(64)
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
    TAIL: tl.constexpr,
) -> None:
    """Compute `BLOCK_Q` queries of one head of one pair; the queries are scaled already.

    Of the pair's `num_slots` keys those at `lengths[pair]` to `text_slots` are padding: their keys
    and values are not read. Keys come in blocks of 64 and a last one of `TAIL`, so that 80 slots
    cost no more than 80.
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

        # The tail is loaded first: it is under way while the whole blocks are worked on.
        before = tl.cdiv(tl.maximum(num_slots - TAIL, 0), BLOCK_KEYS) * BLOCK_KEYS
        tail = before + tl.arange(0, TAIL)
        is_tail = ((tail < length) | (tail >= text_slots)) & (tail < num_slots)
        k_tail, v_tail = _loaded(keys, values, first + tail * key_stride, is_tail, lanes)

        total = tl.zeros((BLOCK_Q, HEAD), tl.float32)
        weight = tl.zeros((BLOCK_Q,), tl.float32)
        most = tl.full((BLOCK_Q,), LOWEST, tl.float32)
        for start in range(0, before, BLOCK_KEYS):
            slots = start + tl.arange(0, BLOCK_KEYS)
            is_real = (slots < length) | (slots >= text_slots)
            k, v = _loaded(keys, values, first + slots * key_stride, is_real, lanes)
            total, weight, most = _attended(q, k, v, is_real, total, weight, most)
        total, weight, most = _attended(q, k_tail, v_tail, is_tail, total, weight, most)
        total = total / weight[:, None]
        target = out + (pair * num_queries + places)[:, None] * out_stride + head * HEAD
        tl.store(target + lanes[None, :], total.to(out.dtype.element_ty), mask=is_query)


@triton.jit
def _loaded(
    keys: tl.tensor, values: tl.tensor, cells: tl.tensor, is_real: tl.tensor, lanes: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Return keys [HEAD, block] and values [block, HEAD], zeros where they are not real."""
    k = tl.load(keys + cells[None, :] + lanes[:, None], mask=is_real[None, :], other=0.0)
    v = tl.load(values + cells[:, None] + lanes[None, :], mask=is_real[:, None], other=0.0)
    return k, v


@triton.jit
def _attended(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    is_real: tl.tensor,
    total: tl.tensor,
    weight: tl.tensor,
    most: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take one block of keys into the running sums of values and weights, and the maximum."""
    scores = tl.where(is_real[None, :], tl.dot(q, k) * LOG2_E, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, axis=1))
    factor = tl.exp2(most - higher)
    scores = tl.exp2(scores - higher[:, None])
    weight = weight * factor + tl.sum(scores, axis=1)
    total = tl.dot(scores.to(v.dtype), v, total * factor[:, None])
    return total, weight, higher
