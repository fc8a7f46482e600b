"""Triton source of `assemble`: a batch -> the hidden states that the first layer reads.

The same arithmetic as the bundle's graph up to its first layer, in float32, rounded once at the
end. The launch also says to all that follow what differs between batches: `lengths`, a text length
a pair, and `control`, where the scores go and how many pairs there are. The reference is
`references.assemble`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def assemble(
    text_ids: tl.tensor,
    text_length: tl.tensor,
    query_of_pair: tl.tensor,
    tokens: tl.tensor,
    scales: tl.tensor,
    fresh: tl.tensor,
    fresh_scales: tl.tensor,
    rows: tl.tensor,
    words: tl.tensor,
    positions: tl.tensor,
    norm_weight: tl.tensor,
    norm_bias: tl.tensor,
    hidden_states: tl.tensor,
    lengths: tl.tensor,
    control: tl.tensor,
    scores: tl.int64,
    num_pairs: tl.int32,
    num_queries: tl.int32,
    text_slots: tl.int32,
    num_tokens: tl.int32,
    num_records: tl.int32,
    num_fresh: tl.int32,
    vocab_size: tl.int32,
    max_positions: tl.int32,
    sep_id: tl.int32,
    hidden: tl.int32,
    width: tl.int32,
    epsilon: tl.float32,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Embed `SLOTS` slots of the batch's P * (T + m + 1), `COLUMNS` >= `width` >= H values each.

    An index outside its table makes the slot NaN; nothing outside the tables is read.
    """
    _hand_over(control, scores, num_pairs)
    num_slots = text_slots + num_tokens + 1
    line = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    pair, slot = line // num_slots, line % num_slots
    is_real = pair < num_pairs
    query, length, is_known = _query(query_of_pair, text_length, pair, is_real, num_queries)
    tl.store(lengths + pair, length, mask=is_real & (slot == 0))
    token = slot - text_slots
    is_visual = (token >= 0) & (token < num_tokens)
    word = tl.load(text_ids + query * text_slots + slot, mask=is_known & (token < 0), other=sep_id)
    row = tl.load(rows + pair, mask=is_real & is_visual, other=-1)
    place, is_placed = _place(slot, length, text_slots, max_positions)
    index = tl.where(is_visual, row, word)
    size = tl.where(is_visual, num_records + num_fresh, vocab_size)
    is_known = is_known & is_placed & _is_inside(index, size)
    columns = tl.arange(0, COLUMNS)
    x = _table_rows(positions, place, is_known, columns, hidden)
    x += _table_rows(words, word, is_known & ~is_visual, columns, hidden)
    is_old, is_fresh, stored = _record(row, token, is_known & is_visual, num_records, num_tokens)
    x += _visual(tokens, scales, stored, is_old, columns, hidden)
    x += _visual(fresh, fresh_scales, stored, is_fresh, columns, hidden)
    x = _layer_norm(x, norm_weight, norm_bias, columns, hidden, epsilon)
    x = tl.where(is_known[:, None], x, float("nan"))
    _store_rows(hidden_states, x, line, is_real, columns, hidden, width)


@triton.jit
def _query(
    query_of_pair: tl.tensor,
    text_length: tl.tensor,
    pair: tl.tensor,
    is_real: tl.tensor,
    num_queries: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return a pair's query, its real text slots, and whether there is such a query."""
    query = tl.load(query_of_pair + pair, mask=is_real, other=-1)
    is_known = _is_inside(query, num_queries)
    return query, tl.load(text_length + query, mask=is_known, other=0), is_known


@triton.jit
def _place(
    slot: tl.tensor, length: tl.tensor, text_slots: tl.tensor, max_positions: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Return a slot's row of the positions' two tables, text and tail, and whether it is one."""
    is_text = slot < text_slots
    position = tl.where(is_text, slot, length + slot - text_slots)
    place = tl.where(is_text, 0, max_positions) + position
    return place, _is_inside(position, max_positions)


@triton.jit
def _record(
    row: tl.tensor,
    token: tl.tensor,
    is_read: tl.tensor,
    num_records: tl.tensor,
    num_tokens: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return whether a visual slot is of a pool or came with the batch, and its token's number.

    A pair's row is a record of the pool, or past those one of what came with the batch.
    """
    is_fresh = row >= num_records
    record = tl.where(is_fresh, row - num_records, row)
    stored = record.to(tl.int64) * num_tokens + token
    return is_read & ~is_fresh, is_read & is_fresh, stored


@triton.jit
def _hand_over(control: tl.tensor, scores: tl.tensor, num_pairs: tl.tensor) -> None:
    if tl.program_id(0) == 0:
        tl.store(control, scores)
        tl.store(control + 1, num_pairs.to(tl.int64))


@triton.jit
def _is_inside(index: tl.tensor, size: tl.tensor) -> tl.tensor:
    return (index >= 0) & (index < size)


@triton.jit
def _store_rows(
    out: tl.tensor,
    x: tl.tensor,
    row: tl.tensor,
    is_real: tl.tensor,
    columns: tl.tensor,
    hidden: tl.tensor,
    width: tl.tensor,
) -> None:
    x = tl.where((columns < hidden)[None, :], x, 0.0)
    mask = is_real[:, None] & (columns < width)[None, :]
    tl.store(out + _cells(row, columns, width), x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _cells(row: tl.tensor, columns: tl.tensor, hidden: tl.tensor) -> tl.tensor:
    return row.to(tl.int64)[:, None] * hidden + columns[None, :]


@triton.jit
def _table_rows(
    table: tl.tensor, row: tl.tensor, is_read: tl.tensor, columns: tl.tensor, hidden: tl.tensor
) -> tl.tensor:
    mask = is_read[:, None] & (columns < hidden)[None, :]
    return tl.load(table + _cells(row, columns, hidden), mask=mask, other=0.0)


@triton.jit
def _visual(
    tokens: tl.tensor,
    scales: tl.tensor,
    stored: tl.tensor,
    is_read: tl.tensor,
    columns: tl.tensor,
    hidden: tl.tensor,
) -> tl.tensor:
    mask = is_read[:, None] & (columns < hidden)[None, :]
    visual = tl.load(
        tokens + _cells(stored, columns, hidden), mask=mask, other=0, eviction_policy="evict_first"
    ).to(tl.float32)
    if scales is not None:
        visual *= tl.load(scales + stored, mask=is_read, other=0.0).to(tl.float32)[:, None]
    return visual


@triton.jit
def _layer_norm(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    columns: tl.tensor,
    hidden: tl.tensor,
    epsilon: tl.tensor,
) -> tl.tensor:
    inside = columns < hidden
    mean = tl.sum(x, axis=1) / hidden  # columns past H hold zeros
    x = tl.where(inside[None, :], x - mean[:, None], 0.0)
    variance = tl.sum(x * x, axis=1) / hidden
    x = x * (1.0 / tl.sqrt(variance + epsilon))[:, None]
    weight = tl.load(weight + columns, mask=inside, other=0.0)
    bias = tl.load(bias + columns, mask=inside, other=0.0)
    return x * weight[None, :] + bias[None, :]
