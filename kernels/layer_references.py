"""What the kernels of an encoder's layers and head compute, in NumPy and float64.

They round nothing: a kernel's sums are float32, and its results and probabilities are rounded to
the type of its rows. Padding is not their matter: their arrays have what counts only.
"""

from __future__ import annotations

import math

import numpy as np

from ..arrays import Array, Float32, Float64, Int32


def product(x: Array, weight: Array, bias: Array, gelu: str) -> Float64:
    """Return `gelu(x @ weight.T + bias)`, [R, O].

    Args:
        x: [R, I].
        weight: [O, I].
        bias: [O].
        gelu: `none`, `exact` or `tanh`.
    """
    return _activated(x.astype(np.float64) @ weight.astype(np.float64).T + bias, gelu)


def product8(
    x: Array, x_scales: Array, weight: Array, weight_scales: Array, bias: Array, gelu: str
) -> Float64:
    """Return `gelu(x @ weight.T + bias)` of 8-bit values times their scales, [R, O].

    Args:
        x, weight: [R, I] and [O, I], of any type whose values are the 8-bit ones.
        x_scales, weight_scales: [R, I / 128] and [O, I / 128].
        bias: [O].
        gelu: `none`, `exact` or `tanh`.
    """
    return product(_scaled(x, x_scales), _scaled(weight, weight_scales), bias, gelu)


def quantize(x: Array, smooth: Array, largest: float) -> tuple[Float32, Float32]:
    """Return what of `x * smooth` is to be rounded to 8 bits [R, C], and scales [R, C / 128].

    Args:
        x: [R, C].
        smooth: [C].
        largest: what the largest of 128 columns becomes: 127 for int8, 448 for E4M3.
    """
    cut = (x.astype(np.float32) * smooth.astype(np.float32)).reshape(len(x), -1, BLOCK)
    most = np.maximum(np.abs(cut).max(axis=2), np.float32(1e-30))
    scales: Float32 = most / np.float32(largest)
    ratio: Float32 = (cut / scales[..., None]).reshape(x.shape)
    return ratio, scales


def _scaled(values: Array, scales: Array) -> Float64:
    result: Float64 = values.astype(np.float64) * np.repeat(scales, BLOCK, axis=1)
    return result


def _activated(result: Float64, gelu: str) -> Float64:
    if gelu == "exact":
        result *= (1 + _erf(result / math.sqrt(2))) / 2
    elif gelu == "tanh":
        inner = math.sqrt(2 / math.pi) * (result + 0.044715 * result**3)
        result *= (1 + np.tanh(inner)) / 2
    return result


def attention(
    queries: Array, keys: Array, values: Array, lengths: Int32, *, text_slots: int, num_heads: int
) -> Float64:
    """Return each query's mix of its pair's values, [P, Q, heads * head].

    Key j of a pair counts where `j < lengths[pair]` or `j >= text_slots`; the others may hold
    anything.

    Args:
        queries: [P, Q, heads * head], scaled already by 1 / sqrt(head).
        keys, values: [P, S, heads * head].
        lengths: int32 [P].
        text_slots: at a pair's begin.
    """
    result = np.zeros(queries.shape)
    places, head = np.arange(keys.shape[1]), queries.shape[2] // num_heads
    for pair, length in enumerate(lengths):
        real = np.flatnonzero((places < length) | (places >= text_slots))
        for start in range(0, queries.shape[2], head):
            part = slice(start, start + head)
            scores = queries[pair, :, part].astype(np.float64) @ keys[pair, real, part].T
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            result[pair, :, part] = weights @ values[pair, real, part]
    return result


def add_norm(x: Array, residual: Array, weight: Array, bias: Array, epsilon: float) -> Float64:
    """Return the LayerNorm of `x + residual`, [R, H].

    Args:
        x, residual: [R, H].
        weight, bias: [H].
        epsilon: added to the variance.
    """
    total = x.astype(np.float64) + residual
    total -= total.mean(axis=-1, keepdims=True)
    variance = np.mean(total * total, axis=-1, keepdims=True)
    result: Float64 = total / np.sqrt(variance + epsilon) * weight + bias
    return result


def score(
    cls: Array,
    pooler_weight: Array,
    pooler_bias: Array,
    classifier_weight: Array,
    classifier_bias: Array,
) -> Float64:
    """Return `tanh(cls @ pooler_weight.T + pooler_bias) @ classifier_weight + bias`, [P].

    Args:
        cls: [P, H].
        pooler_weight: [H, H], outputs first.
        pooler_bias, classifier_weight: [H].
        classifier_bias: [1].
    """
    pooled = np.tanh(cls.astype(np.float64) @ pooler_weight.astype(np.float64).T + pooler_bias)
    result: Float64 = pooled @ classifier_weight + classifier_bias
    return result


def shallow_score(
    hidden_states: Array, lengths: Int32, weight: Array, bias: Array, *, text_slots: int
) -> Float64:
    """Return a linear head of each pair's CLS row, mean text row and mean visual row, [P].

    Neither the text's padding, slots `lengths[pair]` to `text_slots`, nor SEP, the last slot,
    counts; they may hold anything.

    Args:
        hidden_states: [P, S, H].
        lengths: int32 [P].
        weight: [3, H].
        bias: [1].
        text_slots: at a pair's begin.
    """
    wide = hidden_states.astype(np.float64)
    text = [slots[:length].mean(axis=0) for slots, length in zip(wide, lengths, strict=True)]
    rows = np.stack([wide[:, 0], np.array(text), wide[:, text_slots:-1].mean(axis=1)], axis=1)
    result: Float64 = np.einsum("prh,rh->p", rows, weight.astype(np.float64)) + bias
    return result


BLOCK = 128  # columns of a scale
_erf = np.vectorize(math.erf, otypes=[np.float64])
