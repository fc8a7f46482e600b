"""What `make tune` times beside products: residual and norm, alone and with a product.

A product with the norm of its rows is a candidate: it is timed after everything else, beside the
kernels that it would replace.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from ..arrays import Array, DeviceArray, Float32
from ..bundle import ATTENTION_OUTPUT, FFN2
from ..kernels import layer_references
from ..kernels.cuda_variants import COLUMNS, product_norm_name
from ..kernels.launch import KernelLibrary
from ..kernels.norm_call import AddNorm
from ..kernels.product_norm_call import ProductNorm
from ..kernels.tuning import FUSED, NORM
from .tuned_products import NUM_DRAWN, NUM_INPUTS, Call, Product16, spread, view

EPSILON = 1e-12
STEPS = (ATTENTION_OUTPUT, FFN2)  # what a norm follows


def fusable(library: KernelLibrary, element: str, steps: Iterable[str]) -> list[str]:
    """Return those of the steps that have a kernel with their norm here."""
    has = library.has(product_norm_name(element))
    return [step for step in steps if has and step in STEPS]


class _WithResidual(Product16):
    """Arrays of a product, a residual and a norm; results have `COLUMNS` columns."""

    def _drawn(self, random: np.random.Generator) -> dict[str, Array]:
        found = super()._drawn(random)
        rows = self._place.num_rows, COLUMNS
        values = np.resize(found["x0"], NUM_DRAWN)
        for name in (f"residual{n}" for n in range(NUM_INPUTS)):
            found[name] = spread(random, values, rows)
        for name in ("norm_weight", "norm_bias"):
            found[name] = random.standard_normal(COLUMNS).astype(np.float32)
        return found

    def _make_outs(self) -> list[DeviceArray]:
        shape = self._place.num_rows, COLUMNS
        memory, kind = self._place.device.memory, self._host["x0"].dtype
        self._outs = [memory(shape[0] * shape[1], kind) for _ in range(NUM_INPUTS)]
        return [view(out, shape) for out in self._outs]

    def _normed(self, rows: Float32, some: Array) -> Float32:
        residual = self._wide(self._host["residual0"][some])
        norm = self._host["norm_weight"], self._host["norm_bias"]
        return layer_references.add_norm(rows, residual, *norm, EPSILON).astype(np.float32)


class FusedProduct(_WithResidual):
    """A product, its residual and norm in one kernel."""

    def tiles(self) -> list[str]:
        """Return the one form that there is."""
        return [FUSED]

    def _calls(self, tile: str) -> Sequence[Call]:
        place, held = self._place, self._held
        product = ProductNorm(
            place.library,
            dtype=self._element,
            epsilon=EPSILON,
            num_processors=place.device.num_processors,
        )
        linear, norm = (held["weight"], held["bias"]), (held["norm_weight"], held["norm_bias"])
        return [
            partial(
                product.enqueue,
                held[f"x{n}"],
                linear,
                held[f"residual{n}"],
                norm,
                out,
                held["control"],
            )
            for n, out in enumerate(self._make_outs())
        ]

    def _expected(self, some: Array) -> Float32:
        return self._normed(super()._expected(some), some)


class Norm(_WithResidual):
    """Residual and norm by themselves: `x` is what a product has written."""

    def tiles(self) -> list[str]:
        """Return the one form that there is."""
        return [NORM]

    def _calls(self, tile: str) -> Sequence[Call]:
        place, held = self._place, self._held
        norm = AddNorm(
            place.library, dtype=self._element, hidden=COLUMNS, width=COLUMNS, epsilon=EPSILON
        )
        vectors = held["norm_weight"], held["norm_bias"]
        return [
            partial(
                norm.enqueue, held[f"x{n}"], held[f"residual{n}"], *vectors, out, held["control"]
            )
            for n, out in enumerate(self._make_outs())
        ]

    def _expected(self, some: Array) -> Float32:
        return self._normed(self._wide(self._host["x0"][some]), some)
