"""Triton sources that no release has: for what the pretended devices must do, and find out."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_tile(source: tl.tensor, out: tl.tensor, row: tl.int32, column: tl.int32) -> None:
    """Copy the tile at (`row`, `column`) by descriptors, and add 1."""
    out.store([row, column], source.load([row, column]) + 1)


@triton.jit
def fill(out: tl.tensor, first: tl.int32, COUNT: tl.constexpr) -> None:
    """Write `COUNT` ones from element `first` on, wherever that is."""
    places = first + tl.arange(0, COUNT)
    tl.store(out + places, tl.full([COUNT], 1, out.dtype.element_ty))


@triton.jit
def fill_there(control: tl.tensor, COUNT: tl.constexpr) -> None:
    """Write `COUNT` ones to float32 memory whose address lies in `control`."""
    out = tl.load(control).to(tl.pointer_type(tl.float32))
    tl.store(out + tl.arange(0, COUNT), tl.full([COUNT], 1.0, tl.float32))


@triton.jit
def keep_address(control: tl.tensor, scores: tl.int64) -> None:
    """Write the address `scores` into `control`."""
    tl.store(control, scores)
