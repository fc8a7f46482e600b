"""Triton source of `add_norm`: a row plus its residual through a LayerNorm.

Sums are float32, rounded once at the end. What is rounded may be written a second time, in 8 bits.
The references are `layer_references.add_norm` and `quantize`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantize import BLOCK, rounded, scale_of


@triton.jit
def add_norm(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    smooth: tl.tensor | None,
    copy: tl.tensor | None,
    scales: tl.tensor | None,
    control: tl.tensor,
    rows_per_pair: tl.int32,
    residual_stride: tl.int32,
    hidden: tl.int32,
    width: tl.int32,
    epsilon: tl.float32,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    """Write `ROWS` rows of `width` values, of which those past `hidden` are 0.

    `copy`, where there is one, gets them times `smooth` in 8 bits, `scales` their scales.
    """
    num_rows = tl.load(control + 1) * rows_per_pair
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    cells = rows[:, None] * width + columns[None, :]
    added = rows[:, None] * residual_stride + columns[None, :]
    total = tl.load(x + cells, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(residual + added, mask=mask, other=0.0).to(tl.float32)

    inside = columns < hidden
    total = tl.where(inside[None, :], total, 0.0)
    mean = tl.sum(total, axis=1) / hidden
    total = tl.where(inside[None, :], total - mean[:, None], 0.0)
    variance = tl.sum(total * total, axis=1) / hidden
    total = total * (1.0 / tl.sqrt(variance + epsilon))[:, None]
    total = total * tl.load(weight + columns, mask=inside, other=0.0)[None, :]
    total = total + tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    if copy is not None:
        # A NaN row is NaN past `hidden` as well, so that its largest values are.
        exact = total.to(out.dtype.element_ty).to(tl.float32)
        exact = exact * tl.load(smooth + columns, mask=columns < width, other=0.0)[None, :]
        cut = tl.reshape(exact, (ROWS, COLUMNS // BLOCK, BLOCK))
        scale = scale_of(tl.max(tl.abs(cut), axis=2), LARGEST)
        steps = rounded(cut * (1.0 / scale)[:, :, None], copy.dtype.element_ty)
        tl.store(copy + cells, tl.reshape(steps, (ROWS, COLUMNS)), mask=mask)
        blocks = tl.arange(0, COLUMNS // BLOCK)
        here = (rows < num_rows)[:, None] & (blocks < width // BLOCK)[None, :]
        tl.store(scales + rows[:, None] * (width // BLOCK) + blocks[None, :], scale, mask=here)
    total = tl.where(inside[None, :], total, 0.0)  # of a NaN row too
    tl.store(out + cells, total.to(out.dtype.element_ty), mask=mask)
