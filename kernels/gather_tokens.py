"""Triton source of `gather_tokens`: rows of a token store in device memory -> an engine's input.

A copy of bytes: 32-bit words in runs of four, so that every access is one of 16 bytes. The
reference is `references.gather_tokens`.
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
        # Written as a product of 4, the compiler knows that a record starts on 16 bytes.
        record_words = record_vectors * 4
        words = part * (VECTORS * 4) + tl.arange(0, VECTORS * 4)
        inside = words < record_words
        # A record is read once, its copy right after by the engine: keep the copy in L2.
        found = tl.load(
            tokens + row * record_words + words,
            mask=inside & is_held,
            other=-1,
            eviction_policy="evict_first",
        )
        tl.store(out_tokens + pair * record_words + words, found, mask=inside)
        if scales is not None and part == 0:
            _copy_scales(scales, row, out_scales, pair, num_scales, is_held)


@triton.jit
def _copy_scales(
    scales: tl.tensor,
    row: tl.tensor,
    out_scales: tl.tensor,
    pair: tl.tensor,
    num_scales: tl.tensor,
    is_held: tl.tensor,
) -> None:
    for first in range(0, num_scales, 128):
        places = first + tl.arange(0, 128)
        inside = places < num_scales
        found = tl.load(scales + row * num_scales + places, mask=inside & is_held, other=-1)
        tl.store(out_scales + pair * num_scales + places, found, mask=inside)
