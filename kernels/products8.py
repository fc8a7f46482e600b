"""Triton sources of `product8` and `product8_tma`: 8-bit rows times an 8-bit weight.

As `products`, but with scales: a row has one for 128 columns, an output one for 128 inputs. The sum
of each 128 is exact in int32 (E4M3: float32), then multiplied by both scales and added in float32.
The result is 16 bit, or 8 bit again with a scale a row and tile of 128 outputs. A row's result is
the same bits in every batch. The reference is `layer_references.product8`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import activated
from .quantize import BLOCK, rounded, scale_of


@triton.jit
def product8(
    x: tl.tensor,
    x_scales: tl.tensor,
    weight: tl.tensor,
    weight_scales: tl.tensor,
    bias: tl.tensor,
    smooth: tl.tensor | None,
    out: tl.tensor,
    out_scales: tl.tensor | None,
    control: tl.tensor,
    rows_per_pair: tl.int32,
    x_stride: tl.int32,
    scales_stride: tl.int32,
    num_out: tl.int32,
    num_in: tl.int32,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    GELU: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """Compute one tile of `out` [rows, num_out]; tiles of the same rows follow each other."""
    num_rows = tl.load(control + 1).to(tl.int32) * rows_per_pair
    tiles = num_out // BLOCK_OUT
    row = tl.program_id(0) // tiles * BLOCK_ROWS
    column = tl.program_id(0) % tiles * BLOCK_OUT
    if row < num_rows:
        rows = row + tl.arange(0, BLOCK_ROWS)
        columns = column + tl.arange(0, BLOCK_OUT)
        inner = tl.arange(0, BLOCK)
        read = tl.minimum(rows, num_rows - 1).to(tl.int64)
        x_tile = x + read[:, None] * x_stride + inner[None, :]
        x_scale = x_scales + read * scales_stride
        weight_tile = weight + columns[None, :] * num_in + inner[:, None]
        weight_scale = weight_scales + columns * (num_in // BLOCK)
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for _ in range(0, num_in, BLOCK):
            part = tl.dot(tl.load(x_tile), tl.load(weight_tile)).to(tl.float32)
            total += part * tl.load(x_scale)[:, None] * tl.load(weight_scale)[None, :]
            x_tile += BLOCK
            x_scale += 1
            weight_tile += BLOCK
            weight_scale += 1
        total = activated(total + tl.load(bias + columns)[None, :], GELU)
        place = out + rows.to(tl.int64)[:, None] * num_out + columns[None, :]
        mask = rows < num_rows
        if out_scales is None:
            tl.store(place, total.to(out.dtype.element_ty), mask=mask[:, None])
        else:
            total = total * tl.load(smooth + columns)[None, :]
            scale = scale_of(tl.max(tl.abs(total), axis=1), LARGEST)
            steps = rounded(total * (1.0 / scale)[:, None], out.dtype.element_ty)
            tl.store(place, steps, mask=mask[:, None])
            tl.store(out_scales + rows.to(tl.int64) * tiles + column // BLOCK_OUT, scale, mask=mask)


@triton.jit
def product8_tma(
    x: tl.tensor_descriptor,
    x_scales: tl.tensor,
    weight: tl.tensor_descriptor,
    weight_scales: tl.tensor,
    bias: tl.tensor,
    smooth: tl.tensor | None,
    out: tl.tensor_descriptor,
    out_scales: tl.tensor | None,
    control: tl.tensor,
    rows_per_pair: tl.int32,
    scales_stride: tl.int32,
    num_out: tl.int32,
    num_in: tl.int32,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    GELU: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """Compute every `num_programs`-th tile of `out`; the descriptors hold shapes and strides.

    Whole tiles are written, scales of the batch's rows only.
    """
    num_rows = tl.load(control + 1).to(tl.int32) * rows_per_pair
    tiles = num_out // BLOCK_OUT
    num_tiles = tl.cdiv(num_rows, BLOCK_ROWS) * tiles
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        row = tile // tiles * BLOCK_ROWS
        column = tile % tiles * BLOCK_OUT
        rows = row + tl.arange(0, BLOCK_ROWS)
        columns = column + tl.arange(0, BLOCK_OUT)
        read = tl.minimum(rows, num_rows - 1).to(tl.int64)
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for inner in range(0, num_in, BLOCK):
            part = tl.dot(x.load([row, inner]), weight.load([column, inner]).T).to(tl.float32)
            number = inner // BLOCK
            x_scale = tl.load(x_scales + read * scales_stride + number)
            weight_scale = tl.load(weight_scales + columns * (num_in // BLOCK) + number)
            total += part * x_scale[:, None] * weight_scale[None, :]
        total = activated(total + tl.load(bias + columns)[None, :], GELU)
        if out_scales is None:
            out.store([row, column], total.to(out.dtype))
        else:
            total = total * tl.load(smooth + columns)[None, :]
            scale = scale_of(tl.max(tl.abs(total), axis=1), LARGEST)
            out.store([row, column], rounded(total * (1.0 / scale)[:, None], out.dtype))
            place = out_scales + rows.to(tl.int64) * tiles + column // BLOCK_OUT
            tl.store(place, scale, mask=rows < num_rows)
