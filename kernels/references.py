"""What each kernel computes, in NumPy: the specification that tests compare them with.

Those of an encoder's layers are in `layer_references`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Array, Float16, Float32, Int32


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The tables that `assemble` reads, as host arrays; V words of H values.

    Attributes:
        words: float32 [V, H].
        positions: float32 [2, max_positions, H]: `add_types` of the model's two tables.
        norm_weight, norm_bias: float32 [H], of the LayerNorm.
        epsilon: of the LayerNorm.
        sep_id: the word of the last slot.
    """

    words: Float32
    positions: Float32
    norm_weight: Float32
    norm_bias: Float32
    epsilon: float
    sep_id: int


def add_types(positions: Float32, types: Float32) -> Float32:
    """Return [2, max_positions, H]: each position plus the type of text, and of what follows.

    The graph adds position and type first as well, so that sums stay the same to the last bit.

    Args:
        positions: float32 [max_positions, H].
        types: float32 [2, H].
    """
    table: Float32 = positions[None] + types[:, None]
    return table


def gather_tokens(
    records: Array,
    rows: Array,
    out: Array,
    *,
    scales: Float16 | None = None,
    out_scales: Float16 | None = None,
) -> None:
    """Copy record `rows[p]` to place p of `out`, and its scales with it.

    A negative row leaves its place as it is (another source fills it). A row past the store
    fills it with ones: NaN as float16, and as the scale of int8 values.

    Args:
        records: float16 or int8 [R, m, H].
        rows: int32 or int64 [P].
        out: [P, m, H] of the same dtype, written.
        scales, out_scales: float16 [R, m] and [P, m], of int8 tokens only.
    """
    held = np.flatnonzero((rows >= 0) & (rows < len(records)))
    missing = np.flatnonzero(rows >= len(records))
    pairs = [(records, out)]
    if scales is not None and out_scales is not None:
        pairs.append((scales, out_scales))
    for source, target in pairs:
        target[held] = source[rows[held]]
        target.view(np.uint8)[missing] = 0xFF


def scatter_tokens(
    tokens: Array,
    places: Array,
    pool: Array,
    *,
    scales: Float16 | None = None,
    pool_scales: Float16 | None = None,
) -> None:
    """Copy record p of `tokens` to place `places[p]` of `pool`, and its scales with it.

    A place outside the pool, negative or past it, is skipped; the rest of the pool stays as it
    is. No two records may go to the same place.

    Args:
        tokens: float16 or int8 [P, m, H].
        places: int32 or int64 [P].
        pool: [R, m, H] of the same dtype, written.
        scales, pool_scales: float16 [P, m] and [R, m], of int8 tokens only.
    """
    kept = np.flatnonzero((places >= 0) & (places < len(pool)))
    pool[places[kept]] = tokens[kept]
    if scales is not None and pool_scales is not None:
        pool_scales[places[kept]] = scales[kept]


def assemble(
    text_ids: Int32,
    text_length: Int32,
    query_of_pair: Int32,
    records: Array,
    rows: Int32,
    embeddings: Embeddings,
    *,
    scales: Float16 | None = None,
) -> Float32:
    """Return the hidden states float32 [P, T + m + 1, H] that the first layer reads.

    The layout is `[text slots T] [m visual tokens] [SEP]`. Text has positions 0, 1, ... and the
    first type; what follows has positions `text_length` + 0, 1, ... and the second. Padded text
    slots are embedded like any other: attention masks them. Indices must lie in their tables.

    Args:
        text_ids: int32 [Q, T].
        text_length: int32 [Q], CLS and SEP included.
        query_of_pair: int32 [P].
        records: float16 [R, m, H], or int8 with `scales`.
        rows: int32 [P]: the record of each pair.
        scales: float16 [R, m] of int8 records.

    Source: `export/joint_encoder.py`.
    """
    num_slots, num_tokens = text_ids.shape[1], records.shape[1]
    first, second = embeddings.positions
    text = embeddings.words[text_ids] + first[:num_slots]
    tail = second[text_length[:, None] + np.arange(num_tokens + 1)]
    visual = records[rows].astype(np.float32)
    if scales is not None:
        visual *= scales[rows].astype(np.float32)[:, :, None]
    visual += tail[query_of_pair, :-1]
    sep = tail[:, -1:] + embeddings.words[embeddings.sep_id]
    slots = np.concatenate([text[query_of_pair], visual, sep[query_of_pair]], axis=1)
    return _layer_norm(slots, embeddings)


def _layer_norm(x: Float32, embeddings: Embeddings) -> Float32:
    x = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(x * x, axis=-1, keepdims=True)
    x = x / np.sqrt(variance + np.float32(embeddings.epsilon))
    result: Float32 = x * embeddings.norm_weight + embeddings.norm_bias
    return result
