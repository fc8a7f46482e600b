"""What a pair costs, and how many pairs/s a machine's own ceilings allow. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

from ..bundle import ModelSizes

FLOAT16_BYTES = 2


def slots_of(num_wordpieces: int, sizes: ModelSizes) -> int:
    """Return the slots of a sequence: CLS, wordpieces, SEP, visual tokens, SEP."""
    return num_wordpieces + 3 + sizes.num_tokens


def flops_per_pair(slots: int, sizes: ModelSizes, *, cls_only: bool = True) -> int:
    """Return the floating-point operations of one forward: matrix products and attention.

    Args:
        cls_only: the last layer computes the CLS row only, beside all keys and values, as our
            graph does; False: every row, as the official code does (less its vocabulary head).
    """
    d, f = sizes.hidden, sizes.intermediate
    layer = slots * 2 * (4 * d * d + 2 * d * f) + 4 * slots * slots * d
    last = slots * 2 * 2 * d * d + 2 * (2 * d * d + 2 * d * f) + 4 * slots * d
    return sizes.num_layers * layer if not cls_only else (sizes.num_layers - 1) * layer + last


def activation_bytes_per_pair(slots: int, sizes: ModelSizes) -> int:
    """Return the bytes that a chain of fused kernels moves through device memory, float16.

    Five kernels a layer (QKV; attention; output with residual and norm; FFN1 with activation;
    FFN2 with residual and norm), each reading its inputs and writing its output once.
    """
    d, f = sizes.hidden, sizes.intermediate
    per_slot = (d + 3 * d) + (3 * d + d) + (2 * d + d) + (d + f) + (f + d + d)
    return sizes.num_layers * slots * per_slot * FLOAT16_BYTES


def token_bytes_per_pair(sizes: ModelSizes) -> int:
    """Return the bytes of one image's visual tokens, float16."""
    return sizes.num_tokens * sizes.hidden * FLOAT16_BYTES


def roofs(slots: int, sizes: ModelSizes, ceilings: Mapping[str, float]) -> dict[str, float]:
    """Return pairs/s that each measured ceiling allows, by the ceiling's name.

    Args:
        ceilings: of `fp16`, `int8`, `fp8` (operations/s of a large matrix product), `memory`
            (bytes/s of a device-to-device copy, read and written) and `h2d` (bytes/s) those
            that were measured.
    """
    work: dict[str, int] = {
        **dict.fromkeys(("fp16", "int8", "fp8"), flops_per_pair(slots, sizes)),
        "memory": activation_bytes_per_pair(slots, sizes),
        "h2d": token_bytes_per_pair(sizes),
    }
    return {name: ceilings[name] / amount for name, amount in work.items() if name in ceilings}
