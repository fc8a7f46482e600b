"""Triton sources of `product` and `product_tma`: rows times a weight, plus bias, through a GELU.

Both compute the same sums in the same order of k, in float32, rounded once when they are stored.
`product_tma` (compute capability 9.0 and later) lets the copy engine fetch its tiles and stays on
its multiprocessor; `product` loads through pointers. One tile serves every number of rows, and no
sum is shared between programs: a row's result is the same bits in every batch. The reference is
`references.product`.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXACT = tl.constexpr(1)  # of the GELU's forms; 0 is none
TANH = tl.constexpr(2)
EXP_SCALE = tl.constexpr(-0.7213475204444817)  # exp(-x^2 / 2) = exp2(x^2 * EXP_SCALE)
# -2 sqrt(2 / pi) log2(e): (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y))
TANH_SCALE = tl.constexpr(-2.302208198144325)


@triton.jit
def product(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    control: tl.tensor,
    rows_per_pair: tl.int32,
    x_stride: tl.int32,
    num_out: tl.int32,
    num_in: tl.int32,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GELU: tl.constexpr,
) -> None:
    """Compute one tile of `out` [rows, num_out]; tiles of the same rows follow each other.

    `num_out` and `num_in` divide by their blocks. Rows past the batch are neither read nor written.
    """
    num_rows = tl.load(control + 1).to(tl.int32) * rows_per_pair
    tiles = num_out // BLOCK_OUT
    row = tl.program_id(0) // tiles * BLOCK_ROWS
    column = tl.program_id(0) % tiles * BLOCK_OUT
    if row < num_rows:
        rows = row + tl.arange(0, BLOCK_ROWS)
        columns = column + tl.arange(0, BLOCK_OUT)
        inner = tl.arange(0, BLOCK_IN)
        read = tl.minimum(rows, num_rows - 1).to(tl.int64)
        x_tile = x + read[:, None] * x_stride + inner[None, :]
        weight_tile = weight + columns[None, :] * num_in + inner[:, None]
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for _ in range(0, num_in, BLOCK_IN):
            total = tl.dot(tl.load(x_tile), tl.load(weight_tile), total)
            x_tile += BLOCK_IN
            weight_tile += BLOCK_IN
        total = activated(total + tl.load(bias + columns)[None, :], GELU)
        place = out + rows.to(tl.int64)[:, None] * num_out + columns[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=(rows < num_rows)[:, None])


@triton.jit
def product_tma(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    bias: tl.tensor,
    out: tl.tensor_descriptor,
    control: tl.tensor,
    rows_per_pair: tl.int32,
    num_out: tl.int32,
    num_in: tl.int32,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GELU: tl.constexpr,
) -> None:
    """Compute every `num_programs`-th tile of `out`; the descriptors hold shapes and strides.

    Whole tiles are written: rows up to the next multiple of `BLOCK_ROWS` get values that nobody
    reads, as far as the arrays of the descriptors go.
    """
    num_rows = tl.load(control + 1).to(tl.int32) * rows_per_pair
    tiles = num_out // BLOCK_OUT
    num_tiles = tl.cdiv(num_rows, BLOCK_ROWS) * tiles
    columns = tl.arange(0, BLOCK_OUT)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        row = tile // tiles * BLOCK_ROWS
        column = tile % tiles * BLOCK_OUT
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for inner in range(0, num_in, BLOCK_IN):
            total = tl.dot(x.load([row, inner]), weight.load([column, inner]).T, total)
        total = activated(total + tl.load(bias + column + columns)[None, :], GELU)
        out.store([row, column], total.to(out.dtype))


@triton.jit
def activated(x: tl.tensor, GELU: tl.constexpr) -> tl.tensor:
    """Return float32 values through the GELU."""
    if GELU == EXACT:
        # x - h where x > 0, else -h, with h = |x| erfc(|x| / sqrt(2)) / 2: Abramowitz and Stegun
        # 7.1.26, 2e-7 from the truth at most.
        size = tl.abs(x)
        t = 1.0 / (1.0 + 0.23164190 * size)
        series = t * (
            0.127414796
            + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
        )
        h = size * series * tl.exp2(x * x * EXP_SCALE)
        x = tl.maximum(x, 0.0) - h  # a NaN comes back with h
    elif GELU == TANH:
        x = x / (1.0 + tl.exp2((x + 0.044715 * x * x * x) * TANH_SCALE))
    return x
