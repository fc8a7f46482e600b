"""int8 visual tokens: a token is its int8 values times one float16 scale of its own.

The one home of that arithmetic: the store, the pipeline and whoever measures fidelity use it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .arrays import Array, Float16, Int8

MAX_VALUE = 127
# 127 times a larger one would not fit float16 any more.
MAX_SCALE = np.float16(515.5)
# Records worked on at once, so that their float32 copy stays in the caches.
_QUANTIZE_BLOCK, _DEQUANTIZE_BLOCK = 8, 4
_INFINITY_BITS = 0x7C00  # of float16; NaNs lie above


def quantize_tokens(tokens: Float16) -> tuple[Int8, Float16]:
    """Return tokens as int8 [N, m, H] and scales float16 [N, m], both new.

    A token's scale is its largest value over 127, rounded to float16 (up, where rounding down
    would push a value out of int8); zeros get the scale 1. Every value lies within half a scale
    of the token's own, and tokens that were int8 before become the same values again.

    A token that holds NaN or infinity gets zeros and the scale NaN: all of it is NaN when read
    again, so that its image ends as a fault, never as a wrong score.

    Args:
        tokens: float16 [N, m, H].
    """
    values = np.empty(tokens.shape, np.int8)
    scales = np.empty(tokens.shape[:-1], np.float16)
    for block in _blocks(len(tokens), _QUANTIZE_BLOCK):
        part = np.ascontiguousarray(tokens[block])
        scales[block] = _scales(part)
        _divide(part, scales[block], values[block])
    return values, scales


def dequantize_tokens(values: Int8, scales: Float16, out: Float16 | None = None) -> Float16:
    """Return float16 [N, m, H]: values times scales, rounded to float16; NaN where a scale is.

    Args:
        values: int8 [N, m, H].
        scales: float16 [N, m].
        out: float16 [N, m, H], C-contiguous, the caller's, to write into; None makes a new one.
            `values` may be the last half of its memory: what is written never reaches what is
            not read yet.
    """
    tokens = np.empty(values.shape, np.float16) if out is None else out
    for block in _blocks(len(values), _DEQUANTIZE_BLOCK):
        _multiply(values[block], scales[block], tokens[block])
    return tokens


def not_finite(tokens: Array, scales: Float16 | None = None) -> npt.NDArray[np.int64]:
    """Return which records hold NaN or infinity: int64 places, ascending.

    Args:
        tokens: float16 [N, m, H], or int8 with `scales`; C-contiguous.
        scales: float16 [N, m] of int8 tokens, else None.
    """
    bits = (tokens if scales is None else scales).view(np.uint16)
    faulty = np.empty(len(bits), np.bool_)
    axes = tuple(range(1, bits.ndim))
    for block in _blocks(len(bits), _QUANTIZE_BLOCK):
        # Shifted by one the sign is gone, and bits order as the magnitudes do.
        faulty[block] = (bits[block] << 1).max(axis=axes) >= _INFINITY_BITS << 1
    return np.flatnonzero(faulty)


def _scales(tokens: Float16) -> Float16:
    """Return the scales of float16 [B, m, H], NaN where a token is not finite."""
    # Bits of magnitudes order as the floats do, and integers compare ten times as fast.
    bits: npt.NDArray[np.uint16] = (tokens.view(np.uint16) & 0x7FFF).max(axis=-1)
    largest = bits.view(np.float16).astype(np.float32)
    scales: Float16 = np.minimum(largest / MAX_VALUE, MAX_SCALE).astype(np.float16)
    short = largest > scales.astype(np.float32) * (MAX_VALUE + 0.5)
    scales[short] = np.nextafter(scales[short], np.float16(np.inf))
    scales[scales == 0] = 1
    scales[bits >= _INFINITY_BITS] = np.nan
    return scales


def _divide(tokens: Float16, scales: Float16, out: Int8) -> None:
    """Write tokens over scales, rounded, into `out`; 0 where the scale is NaN."""
    floats = tokens.astype(np.float32)
    broken = np.isnan(scales)
    if broken.any():
        floats[broken] = 0
        scales = np.where(broken, np.float16(1), scales)
    floats /= scales.astype(np.float32)[..., None]
    np.rint(floats, out=floats)
    np.copyto(out, floats, casting="unsafe")


def _multiply(values: Int8, scales: Float16, out: Float16) -> None:
    """Write values times scales into `out`, rounded half to even."""
    wide = scales.astype(np.float32)[..., None]
    if not ((wide >= 2.0**-14) & (wide <= 511)).all():  # near float16's limits, or NaN
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, np.multiply(values, wide), casting="same_kind")
        return
    # NumPy rounds to float16 one value at a time. Integers take half the time: times 2^-112 the
    # exponent of a float32 is that of the float16, and 13 bits of the fraction are to be rounded.
    bits = np.multiply(values, wide * np.float32(2.0**-112)).view(np.uint32)
    rest = bits >> 13
    rest &= 1
    rest += 0xFFF
    bits += rest
    np.right_shift(bits, 13, out=rest)
    bits >>= 16
    bits &= 0x8000
    bits |= rest
    np.copyto(out.view(np.uint16), bits, casting="unsafe")


def _blocks(num_records: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, num_records, size))
