"""Triton source of `shallow_score`: a linear head over every slot's row, in float32.

It reads three rows of a pair: CLS, the mean of the real text slots, the mean of the visual ones.
The reference is `layer_references.shallow_score`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shallow_score(
    hidden_states: tl.tensor,
    lengths: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    control: tl.tensor,
    num_slots: tl.int32,
    text_slots: tl.int32,
    width: tl.int32,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Store one pair's score where `control[0]` says; `COLUMNS` divides `width`.

    Neither the text's padding, slots `lengths[pair]` to `text_slots`, nor SEP, the last slot, is
    read. One program adds up a pair, always in the same order.
    """
    pair = tl.program_id(0).to(tl.int64)
    if pair < tl.load(control + 1):
        length = tl.load(lengths + pair)
        sep = num_slots - 1
        first = hidden_states + pair * num_slots * width
        products = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, width, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            text = tl.zeros((SLOTS, COLUMNS), tl.float32)
            visual = tl.zeros((SLOTS, COLUMNS), tl.float32)
            for slot in range(0, sep, SLOTS):
                slots = slot + tl.arange(0, SLOTS)
                is_text = (slots < length) & (slots < text_slots)
                is_visual = (slots >= text_slots) & (slots < sep)
                rows = first + slots[:, None] * width + columns[None, :]
                x = tl.load(rows, mask=(is_text | is_visual)[:, None], other=0.0).to(tl.float32)
                text += tl.where(is_text[:, None], x, 0.0)
                visual += tl.where(is_visual[:, None], x, 0.0)
            cls = tl.load(first + columns).to(tl.float32)
            of_text = tl.sum(text, axis=0) / length
            of_visual = tl.sum(visual, axis=0) / (sep - text_slots)
            products += cls * tl.load(weight + columns)
            products += of_text * tl.load(weight + width + columns)
            products += of_visual * tl.load(weight + 2 * width + columns)
        score = tl.sum(products, axis=0) + tl.load(bias)
        tl.store(tl.load(control).to(tl.pointer_type(tl.float32)) + pair, score)
