"""The variants that an encoder's layers and head run; `layers` launches them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .variant import (
    COMPUTE_CAPABILITIES,
    ELEMENTS,
    POINTER_CAPABILITIES,
    TMA_CAPABILITIES,
    Parameter,
    Variant,
)

# Widths are multiples of it; 8-bit rows have a scale for as many columns.
UNIT = 128
ACTIVATIONS = ("float16", "bfloat16")
GELU_FORMS = {"none": 0, "exact": 1, "tanh": 2}


class Tile(NamedTuple):
    """What one program of a product takes at once, and how it is compiled."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


TMA_TILES = {
    "128x64x64": Tile(128, 64, 64, 4, 4),
    "64x128x64": Tile(64, 128, 64, 4, 4),
    "128x128x64": Tile(128, 128, 64, 8, 3),
    "64x64x64": Tile(64, 64, 64, 4, 4),
}
POINTER_TILES = {
    "128x64x64": Tile(128, 64, 64, 4, 3),
    "64x128x64": Tile(64, 128, 64, 4, 3),
    "64x64x64": Tile(64, 64, 64, 4, 3),
}
ATTENTION_HEADS = (32, 64)
# Slots of a pair that are weighed at once: a block and a tail. Any other number in half blocks.
ATTENTION_BLOCK = 64
ATTENTION_SLOTS = (80, 96, 128)
ANY_SLOTS = 0
# Queries that a program takes: of all slots, or of the CLS row alone. The latter for 128 slots
# only: what more of them save is less than what their cubins weigh.
ALL_QUERIES, ONE_QUERY = 64, 16
NORM_COLUMNS = (128, 512, 1024)
NORM_ROWS = 4
SCORE_PAIRS = 16
SHALLOW_SLOTS = 32


def product_name(dtype: str, gelu: str, tile: str) -> str:
    """Return the name of the product that loads through pointers."""
    return f"product_{dtype}_{gelu}_{tile}"


def product_tma_name(dtype: str, gelu: str, tile: str) -> str:
    """Return the name of the product whose tiles the copy engine fetches."""
    return f"product_tma_{dtype}_{gelu}_{tile}"


def attention_name(dtype: str, head: int, queries: int, slots: int) -> str:
    """Return the name for heads of `head` values, `queries` at once, at most `slots` a pair."""
    return f"attention_{dtype}_{head}_q{queries}_{f's{slots}' if slots else 'any'}"


def attention_sizes(num_queries: int, num_slots: int) -> tuple[int, int]:
    """Return the queries that a program takes, and the slots of a pair that it is made for."""
    fitting = [slots for slots in ATTENTION_SLOTS if slots >= num_slots > ATTENTION_BLOCK]
    if not fitting:
        return ALL_QUERIES, ANY_SLOTS
    if num_queries <= ONE_QUERY:
        return ONE_QUERY, ATTENTION_SLOTS[-1]
    return ALL_QUERIES, fitting[0]


def add_norm_name(dtype: str, columns: int) -> str:
    """Return the name for rows of at most `columns` values."""
    return f"add_norm_{dtype}_{columns}"


def score_name(dtype: str) -> str:
    """Return the name for CLS rows of this dtype."""
    return f"score_{dtype}"


def shallow_score_name(dtype: str) -> str:
    """Return the name for hidden states of this dtype."""
    return f"shallow_score_{dtype}"


def layer_variants(dtype: str) -> Iterator[Variant]:
    """Yield everything that an encoder's layers and head run on activations of this dtype."""
    for gelu in GELU_FORMS:
        yield from (_product(dtype, gelu, tile) for tile in POINTER_TILES)
        yield from (_product_tma(dtype, gelu, tile) for tile in TMA_TILES)
    for head in ATTENTION_HEADS:
        for slots in (*ATTENTION_SLOTS, ANY_SLOTS):
            yield _attention(dtype, head, ALL_QUERIES, slots)
        yield _attention(dtype, head, ONE_QUERY, ATTENTION_SLOTS[-1])
    for columns in NORM_COLUMNS:
        yield add_norm_variant(add_norm_name(dtype, columns), dtype, columns)
    yield _score(dtype)
    yield _shallow_score(dtype)


def _product(dtype: str, gelu: str, tile: str) -> Variant:
    address = f"*{ELEMENTS[dtype]}"
    parameters = (
        *(Parameter(name, address, 16) for name in ("x", "weight")),
        Parameter("bias", "*fp32", 16),
        Parameter("out", address, 16, written=True),
        Parameter("control", "*i64"),
        Parameter("rows_per_pair", "i32"),
        *(Parameter(name, "i32", 16) for name in ("x_stride", "num_out", "num_in")),
    )
    shape = POINTER_TILES[tile]
    return Variant(
        product_name(dtype, gelu, tile),
        "products",
        "product",
        parameters,
        _product_constants(shape, gelu),
        shape.num_warps,
        shape.num_stages,
        POINTER_CAPABILITIES,
    )


def _product_tma(dtype: str, gelu: str, tile: str) -> Variant:
    shape, element = TMA_TILES[tile], ELEMENTS[dtype]
    parameters = (
        Parameter("x", f"tensordesc<{element}[{shape.rows},{shape.inputs}]>"),
        Parameter("weight", f"tensordesc<{element}[{shape.outputs},{shape.inputs}]>"),
        Parameter("bias", "*fp32", 16),
        Parameter("out", f"tensordesc<{element}[{shape.rows},{shape.outputs}]>", written=True),
        Parameter("control", "*i64"),
        Parameter("rows_per_pair", "i32"),
        *(Parameter(name, "i32", 16) for name in ("num_out", "num_in")),
    )
    return Variant(
        product_tma_name(dtype, gelu, tile),
        "products",
        "product_tma",
        parameters,
        _product_constants(shape, gelu),
        shape.num_warps,
        shape.num_stages,
        TMA_CAPABILITIES,
    )


def _product_constants(tile: Tile, gelu: str) -> dict[str, int | None]:
    sizes = {"BLOCK_ROWS": tile.rows, "BLOCK_OUT": tile.outputs, "BLOCK_IN": tile.inputs}
    return {**sizes, "GELU": GELU_FORMS[gelu]}


def _attention(dtype: str, head: int, queries: int, slots: int) -> Variant:
    address = f"*{ELEMENTS[dtype]}"
    strides = ("query_stride", "query_pair_stride", "key_stride", "out_stride")
    parameters = (
        *(Parameter(name, address, 16) for name in ("queries", "keys", "values")),
        Parameter("out", address, 16, written=True),
        Parameter("lengths", "*i32"),
        Parameter("control", "*i64"),
        *(Parameter(name, "i32", 16) for name in strides),
        *(Parameter(name, "i32") for name in ("num_queries", "num_slots")),
        *(Parameter(name, "i32") for name in ("text_slots", "num_heads")),
    )
    block = ATTENTION_BLOCK if slots else ATTENTION_BLOCK // 2
    sizes: dict[str, int | None] = {"HEAD": head, "BLOCK_Q": queries}
    sizes |= {"BLOCK_KEYS": block, "TAIL": max(slots - block, 0)}
    name = attention_name(dtype, head, queries, slots)
    # More loads in flight would take registers, and on 9.0 ptxas then runs the `wgmma` one after
    # the other.
    return Variant(name, "attention", "attention", parameters, sizes, num_stages=1)


def add_norm_variant(
    name: str,
    dtype: str,
    columns: int,
    copies: tuple[Parameter, ...] = (),
    *,
    largest: int = 0,
    capabilities: tuple[str, ...] = COMPUTE_CAPABILITIES,
) -> Variant:
    """Return an `add_norm`; `copies` are its parameters of a second result, in 8 bits."""
    address = f"*{ELEMENTS[dtype]}"
    parameters = (
        *(Parameter(name, address, 16) for name in ("x", "residual")),
        *(Parameter(name, "*fp32", 16) for name in ("weight", "bias")),
        Parameter("out", address, 16, written=True),
        *copies,
        Parameter("control", "*i64"),
        Parameter("rows_per_pair", "i32"),
        *(Parameter(name, "i32", 16) for name in ("residual_stride", "hidden", "width")),
        Parameter("epsilon", "fp32"),
    )
    sizes: dict[str, int | None] = {"ROWS": NORM_ROWS, "COLUMNS": columns, "LARGEST": largest}
    if not copies:
        sizes |= {"smooth": None, "copy": None, "scales": None}
    return Variant(name, "norms", "add_norm", parameters, sizes, capabilities=capabilities)


def _score(dtype: str) -> Variant:
    # What `control` points to is written, not `control`.
    parameters = (
        Parameter("cls", f"*{ELEMENTS[dtype]}", 16),
        *(Parameter(f"pooler_{name}", "*fp32", 16) for name in ("weight", "bias")),
        Parameter("classifier_weight", "*fp32", 16),
        Parameter("classifier_bias", "*fp32"),
        Parameter("control", "*i64"),
        Parameter("width", "i32", 16),
    )
    sizes: dict[str, int | None] = {"PAIRS": SCORE_PAIRS, "BLOCK_OUT": 64, "BLOCK_IN": 32}
    return Variant(score_name(dtype), "score", "score", parameters, sizes)


def _shallow_score(dtype: str) -> Variant:
    parameters = (
        Parameter("hidden_states", f"*{ELEMENTS[dtype]}", 16),
        Parameter("lengths", "*i32"),
        Parameter("weight", "*fp32", 16),
        Parameter("bias", "*fp32"),
        Parameter("control", "*i64"),
        *(Parameter(name, "i32") for name in ("num_slots", "text_slots")),
        Parameter("width", "i32", 16),
    )
    sizes: dict[str, int | None] = {"SLOTS": SHALLOW_SLOTS, "COLUMNS": UNIT}
    return Variant(shallow_score_name(dtype), "shallow_score", "shallow_score", parameters, sizes)
