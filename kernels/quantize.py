"""Triton source of `quantize`, and what kernels share that make 8-bit values.

128 columns of a row have one scale: their largest |x| / 127 (int8) or / 448 (E4M3), so that the
largest lands on the last step. The reference is `layer_references.quantize`.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)  # columns of a scale
# Blocks of smaller values become zeros; scales stay normal float32 numbers.
LEAST = tl.constexpr(1e-30)
# Added and taken away, it leaves a float32 number rounded to the nearest integer, ties to even.
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def scale_of(largest: tl.tensor, LARGEST: tl.constexpr) -> tl.tensor:
    """Return the scale of blocks whose largest |x| is `largest`; NaN where that is NaN."""
    return tl.div_rn(tl.where(largest < LEAST, LEAST, largest), LARGEST * 1.0)


@triton.jit
def rounded(ratio: tl.tensor, kind: tl.constexpr) -> tl.tensor:
    """Return what is left of values over their scale in the 8-bit type `kind`."""
    if kind == tl.int8:
        ratio = ratio + ROUNDING - ROUNDING
    return ratio.to(kind)


@triton.jit
def quantize(
    x: tl.tensor,
    smooth: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    control: tl.tensor,
    rows_per_pair: tl.int32,
    width: tl.int32,
    ROWS: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """Write 128 columns of `ROWS` rows of `x * smooth` in 8 bits, and their scales."""
    num_rows = tl.load(control + 1) * rows_per_pair
    blocks = width // BLOCK
    block = tl.program_id(0) % blocks
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    cells = rows[:, None] * width + columns[None, :]
    values = tl.load(x + cells, mask=mask[:, None], other=0.0).to(tl.float32)
    values = values * tl.load(smooth + columns)[None, :]
    # No maximum is NaN because one value is: the sum is, and the scale with it.
    largest = tl.max(tl.abs(values), axis=1) + tl.sum(values * 0.0, axis=1)
    scale = scale_of(largest, LARGEST)
    steps = rounded(values * (1.0 / scale)[:, None], out.dtype.element_ty)
    tl.store(out + cells, steps, mask=mask[:, None])
    tl.store(scales + rows * blocks + block, scale, mask=mask)
