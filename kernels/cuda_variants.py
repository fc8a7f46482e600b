"""What is compiled of the CUDA C++ sources: types, sizes and what a launch passes."""

from __future__ import annotations

from collections.abc import Iterator

from .layer_variants import ACTIVATIONS
from .manifest import TensorMap
from .variant import ELEMENTS, Parameter, Variant

SOURCES = ("hopper.cuh", "layout.cuh", "product_norm.cu")
CAPABILITY = "9.0"  # `wgmma` belongs to this very chip
# A tile of `product_norm`: whole rows, so many inputs of them at once; and stages in flight.
ROWS, COLUMNS, BLOCK_IN, STAGES = 128, 384, 64, 3
NUM_WARPS = 12
FETCHED = {"x": ROWS, "weight": COLUMNS // 2, "residual": ROWS}  # rows of one copy
# In the driver's numbers (CUtensorMapSwizzle, CUtensorMapDataType).
SWIZZLE_128B = 3
ELEMENT_TYPES = {"float16": 6, "bfloat16": 9}
ELEMENT_BYTES = 2


def product_norm_name(dtype: str) -> str:
    """Return the name of a product with residual and norm behind it, for rows of this dtype."""
    return f"product_norm_{dtype}"


def cuda_variants() -> tuple[Variant, ...]:
    """Return every kernel that is built of CUDA C++; `constants` are the compiler's definitions."""
    return tuple(map(_product_norm, ACTIVATIONS))


def shared_bytes() -> int:
    """Return the dynamic shared memory of `product_norm`, which its source asserts.

    Stages, three vectors of float32, two barriers a stage, and what aligns the first stage to the
    1,024 bytes of the swizzle's pattern.
    """
    stage = (ROWS + COLUMNS) * BLOCK_IN * ELEMENT_BYTES
    return STAGES * stage + 3 * COLUMNS * 4 + 2 * 8 * STAGES + 1024


def tensor_maps(dtype: str) -> Iterator[TensorMap]:
    """Yield how launches of `product_norm` encode its arrays."""
    for name, rows in FETCHED.items():
        element = ELEMENT_TYPES[dtype]
        yield TensorMap(name, SWIZZLE_128B, element, ELEMENT_BYTES, (rows, BLOCK_IN))


def _product_norm(dtype: str) -> Variant:
    element = ELEMENTS[dtype]
    parameters = (
        *(
            Parameter(name, f"tensordesc<{element}[{rows},{BLOCK_IN}]>")
            for name, rows in FETCHED.items()
        ),
        *(Parameter(name, "*fp32") for name in ("bias", "norm_weight", "norm_bias")),
        Parameter("out", f"*{element}", 16, written=True),
        Parameter("control", "*i64"),
        Parameter("rows_per_pair", "i32"),
        Parameter("num_in", "i32", BLOCK_IN),
        Parameter("epsilon", "fp32"),
    )
    constants: dict[str, int | None] = {
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "BLOCK_IN": BLOCK_IN,
        "STAGES": STAGES,
        "SHARED_BYTES": shared_bytes(),
        "BFLOAT16": int(dtype == "bfloat16"),
    }
    return Variant(
        product_norm_name(dtype),
        "product_norm",
        "product_norm",
        parameters,
        constants,
        NUM_WARPS,
        STAGES,
        (CAPABILITY,),
    )
