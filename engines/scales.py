"""How a backend scales the activations of its 8-bit products, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast

from ..bundle import ModelSizes
from .contract import Backend

STATIC, DYNAMIC = "static", "dynamic"
NOTHING: Mapping[str, str] = MappingProxyType({})
BLOCK = 128


@dataclass(frozen=True, slots=True)
class Scales:
    """One way of scaling that a backend offers.

    Attributes:
        kind: `static`, one a tensor, stored in the graph; or `dynamic`, found while running, one a
            token and `block` columns, with weights scaled an output and `block` inputs.
        cost: time of an 8-bit product as a share of the one that is not quantised, about: the
            search weighs ways by it.
        block: columns that share a dynamic scale. The last block of a row may be shorter.
        never: parts of a layer (`attention_output`) that are not quantised, each with its reason.
        weight_bits: bits of an int8 weight, its sign included: 8, or 7 where the CPU adds pairs of
            byte products in 16 bits.
    """

    kind: str = STATIC
    cost: float = 0.5
    block: int = BLOCK
    never: Mapping[str, str] = field(default_factory=lambda: NOTHING, hash=False)
    weight_bits: int = 8

    @property
    def words(self) -> str:
        """Tell ways apart in a manifest: `static`, `dynamic, 128 columns, 7-bit weights`."""
        way = self.kind if self.kind == STATIC else f"{self.kind}, {self.block} columns"
        return way if self.weight_bits == 8 else f"{way}, {self.weight_bits}-bit weights"

    @property
    def key(self) -> str:
        """Tell graphs made by different ways apart, in a file's name."""
        numbers = f"{self.cost:g}", f"{self.block}", f"{self.weight_bits}"
        return "-".join([self.kind, *numbers, *self.never])


ONLY_STATIC = (Scales(),)


def scales_of(backend: Backend, precision: str, sizes: ModelSizes) -> tuple[Scales, ...]:
    """Return the ways that `backend` offers for a model; static where it says nothing.

    A backend says it by a function `activation_scales(precision, sizes) -> Sequence[Scales]`.
    """
    offered = getattr(backend, "activation_scales", None)
    if offered is None:
        return ONLY_STATIC
    return tuple(cast(Callable[[str, ModelSizes], Sequence[Scales]], offered)(precision, sizes))
