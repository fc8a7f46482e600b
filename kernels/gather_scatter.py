"""Triton sources of `gather_tokens` and `scatter_tokens`: whole records out of device memory, and
into it.

Copies of bytes: 32-bit words in runs of four, so that every access is one of 16 bytes. The
references are `references.gather_tokens` and `references.scatter_tokens`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_tokens(
    tokens: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    out_tokens: tl.tensor,
    out_scales: tl.tensor,
    num_records: tl.int64,
    record_vectors: tl.int32,
    num_scales: tl.int32,
    VECTORS: tl.constexpr,
) -> None:
    """Copy record `rows[pair]` of 16 * `record_vectors` bytes to place `pair` of the output.

    One program copies `VECTORS` * 16 bytes of one record. A negative row leaves its place as it
    is; a row past the store fills it with ones, which are NaN in float16.
    """
    num_parts = tl.cdiv(record_vectors, VECTORS)
    pair = (tl.program_id(0) // num_parts).to(tl.int64)
    part = tl.program_id(0) % num_parts
    row = tl.load(rows + pair).to(tl.int64)
    if row >= 0:
        is_held = row < num_records
        _copy_part(tokens, row, out_tokens, pair, record_vectors, part, is_held, VECTORS)
        if scales is not None and part == 0:
            _copy_scales(scales, row, out_scales, pair, num_scales, is_held)


@triton.jit
def scatter_tokens(
    tokens: tl.tensor,
    scales: tl.tensor,
    places: tl.tensor,
    out_tokens: tl.tensor,
    out_scales: tl.tensor,
    num_records: tl.int64,
    record_vectors: tl.int32,
    num_scales: tl.int32,
    VECTORS: tl.constexpr,
) -> None:
    """Copy record `pair` of 16 * `record_vectors` bytes to place `places[pair]` of the output.

    One program copies `VECTORS` * 16 bytes of one record. Where the place is none of the output's
    `num_records`, nothing is written.
    """
    num_parts = tl.cdiv(record_vectors, VECTORS)
    pair = (tl.program_id(0) // num_parts).to(tl.int64)
    part = tl.program_id(0) % num_parts
    place = tl.load(places + pair).to(tl.int64)
    is_inside = (place >= 0) & (place < num_records)
    if is_inside:
        _copy_part(tokens, pair, out_tokens, place, record_vectors, part, is_inside, VECTORS)
        if scales is not None and part == 0:
            _copy_scales(scales, pair, out_scales, place, num_scales, is_inside)


@triton.jit
def _copy_part(
    tokens: tl.tensor,
    source: tl.tensor,
    out_tokens: tl.tensor,
    target: tl.tensor,
    record_vectors: tl.tensor,
    part: tl.tensor,
    is_held: tl.tensor,
    VECTORS: tl.constexpr,
) -> None:
    """Copy one part of record `source` to record `target`; ones where no such record is held."""
    # Written as a product of 4, the compiler knows that a record starts on 16 bytes.
    record_words = record_vectors * 4
    words = part * (VECTORS * 4) + tl.arange(0, VECTORS * 4)
    inside = words < record_words
    # The copy is what is read next: keep it in L2, not the record.
    found = tl.load(
        tokens + source * record_words + words,
        mask=inside & is_held,
        other=-1,
        eviction_policy="evict_first",
    )
    tl.store(out_tokens + target * record_words + words, found, mask=inside)


@triton.jit
def _copy_scales(
    scales: tl.tensor,
    source: tl.tensor,
    out_scales: tl.tensor,
    target: tl.tensor,
    num_scales: tl.tensor,
    is_held: tl.tensor,
) -> None:
    for first in range(0, num_scales, 128):
        columns = first + tl.arange(0, 128)
        inside = columns < num_scales
        found = tl.load(scales + source * num_scales + columns, mask=inside & is_held, other=-1)
        tl.store(out_scales + target * num_scales + columns, found, mask=inside)
