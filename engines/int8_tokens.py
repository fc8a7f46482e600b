"""int8 visual tokens: a token is its int8 values times one float16 scale of its own.

The one home of that arithmetic: the store, fidelity and the pipeline all use it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .contract import Float16

Int8 = npt.NDArray[np.int8]

MAX_VALUE = 127
# 127 times a larger one would not fit float16 any more.
MAX_SCALE = np.float16(515.5)
# Records worked on at once: their float32 copy stays in the caches.
_BLOCK = 8
_INFINITE = 0x7C00  # the bits of float16's infinity; NaNs lie above


def quantize_tokens(tokens: Float16) -> tuple[Int8, Float16]:
    """Return tokens as int8 [N, m, H] and scales float16 [N, m], both new.

    A token's scale is its largest value over 127, rounded up in float16 so that no value leaves
    int8; zeros get the scale 1. Every value lies within half a scale of the token's own. A token
    that holds NaN or infinity gets zeros and the scale NaN: all of it is NaN when read again, so
    that its image ends as a fault, never as a wrong score.

    Args:
        tokens: float16 [N, m, H].
    """
    values = np.empty(tokens.shape, np.int8)
    scales = np.empty(tokens.shape[:-1], np.float16)
    for block in _blocks(len(tokens)):
        part = np.ascontiguousarray(tokens[block])
        scales[block] = _scales(part)
        floats = part.astype(np.float32)
        with np.errstate(invalid="ignore"):  # infinity over NaN; zeroed below
            floats /= scales[block].astype(np.float32)[..., None]
        np.rint(floats, out=floats)
        broken = np.isnan(scales[block])
        if broken.any():
            floats[broken] = 0
        np.copyto(values[block], floats, casting="unsafe")
    return values, scales


def dequantize_tokens(values: Int8, scales: Float16, out: Float16 | None = None) -> Float16:
    """Return float16 [N, m, H]: values times scales, rounded to float16; NaN where a scale is.

    Args:
        values: int8 [N, m, H].
        scales: float16 [N, m].
        out: float16 [N, m, H], C-contiguous, the caller's, to write into; None makes a new one.
    """
    tokens = np.empty(values.shape, np.float16) if out is None else out
    for block in _blocks(len(values)):
        wide = scales[block].astype(np.float32)[..., None]
        with np.errstate(over="ignore"):  # a foreign scale may overflow; infinity says so
            np.copyto(tokens[block], np.multiply(values[block], wide), casting="same_kind")
    return tokens


def _scales(tokens: Float16) -> Float16:
    """Return the scales of float16 [B, m, H], NaN where a token is not finite."""
    magnitudes = tokens.view(np.uint16) & np.uint16(0x7FFF)
    # Bits of positive floats order as the floats do, and integers compare ten times as fast.
    largest: npt.NDArray[np.uint16] = magnitudes.max(axis=-1)
    exact = largest.view(np.float16).astype(np.float32) / MAX_VALUE
    scales = np.minimum(exact, MAX_SCALE).astype(np.float16)
    short = scales.astype(np.float32) < exact
    scales[short] = np.minimum(np.nextafter(scales[short], np.float16(np.inf)), MAX_SCALE)
    scales[scales == 0] = 1
    scales[largest >= _INFINITE] = np.nan
    return scales


def _blocks(num_records: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, num_records, _BLOCK))
