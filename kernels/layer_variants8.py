"""The variants of an encoder's layers that read or write 8-bit rows; `layers8` launches them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .layer_variants import GELU_FORMS, NORM_COLUMNS, UNIT, add_norm_variant
from .variant import (
    COMPUTE_CAPABILITIES,
    ELEMENTS,
    TMA_CAPABILITIES,
    Parameter,
    Variant,
)

QUANTIZE_ROWS = 16
# What is not quantised is in this type, and so are the results of products.
WIDE = "float16"


class Kind(NamedTuple):
    """A type of 8-bit values.

    Attributes:
        numpy: the type of arrays that hold them; E4M3 is no type of NumPy's own.
        largest: what the largest value of a block becomes.
        capabilities: the architectures whose tensor cores multiply them.
    """

    numpy: str
    largest: int
    capabilities: tuple[str, ...]


KINDS = {
    "int8": Kind("int8", 127, COMPUTE_CAPABILITIES),
    "fp8": Kind("uint8", 448, COMPUTE_CAPABILITIES[2:]),
}


class Tile8(NamedTuple):
    """What one program takes at once, and how it is compiled."""

    rows: int
    outputs: int
    num_warps: int
    num_stages: int
    capabilities: tuple[str, ...]

    def takes(self, gelu: str) -> bool:
        """Tell whether it is built: behind a GELU only with all of a scale's 128 columns."""
        return gelu == "none" or self.outputs == UNIT


# Not measured: the tiles that were fastest in trial kernels on an H200, or like them.
TMA_TILES8 = {
    "64x128x128": Tile8(64, 128, 4, 3, TMA_CAPABILITIES),
    "128x64x128": Tile8(128, 64, 4, 3, ("9.0",)),  # on 10.0 it spills
    "128x128x128": Tile8(128, 128, 8, 2, ("9.0",)),  # so does this, there and with a third stage
}
POINTER_TILES8 = {"64x128x128": Tile8(64, 128, 8, 3, COMPUTE_CAPABILITIES[:3])}


def product8_name(kind: str, gelu: str, out: str, tile: str) -> str:
    """Return the name of the product that loads through pointers."""
    return f"product8_{kind}_{gelu}_to_{out}_{tile}"


def product8_tma_name(kind: str, gelu: str, out: str, tile: str) -> str:
    """Return the name of the product whose tiles the copy engine fetches."""
    return f"product8_tma_{kind}_{gelu}_to_{out}_{tile}"


def add_norm8_name(kind: str, columns: int) -> str:
    """Return the name for rows of at most `columns` values, which it copies in 8 bits."""
    return f"add_norm_{WIDE}_{columns}_and_{kind}"


def quantize_name(kind: str) -> str:
    """Return the name of what makes rows 8 bit."""
    return f"quantize_{WIDE}_to_{kind}"


def eight_bit_variants() -> Iterator[Variant]:
    """Yield everything that layers with 8-bit rows run beside what 16-bit ones do."""
    for kind in KINDS:
        for gelu in GELU_FORMS:
            for out in (WIDE, kind) if gelu != "none" else (WIDE,):
                for tile in POINTER_TILES8:
                    yield _product8(kind, gelu, out, tile)
                for tile, shape in TMA_TILES8.items():
                    if shape.takes(gelu):
                        yield _product8_tma(kind, gelu, out, tile)
        for columns in NORM_COLUMNS:
            yield _add_norm8(kind, columns)
        yield _quantize(kind)


def _product8(kind: str, gelu: str, out: str, tile: str) -> Variant:
    shape = POINTER_TILES8[tile]
    address = f"*{ELEMENTS[kind]}"
    parameters = (
        Parameter("x", address, 16),
        Parameter("x_scales", "*fp32"),
        Parameter("weight", address, 16),
        *_scales_and_bias(out),
        Parameter("out", f"*{ELEMENTS[out]}", 16, written=True),
        *_out_scales(out),
        Parameter("control", "*i64"),
        Parameter("rows_per_pair", "i32"),
        Parameter("x_stride", "i32", 16),
        Parameter("scales_stride", "i32"),
        *(Parameter(name, "i32", 16) for name in ("num_out", "num_in")),
    )
    return Variant(
        product8_name(kind, gelu, out, tile),
        "products8",
        "product8",
        parameters,
        _constants(shape, kind, gelu, out),
        shape.num_warps,
        shape.num_stages,
        _both(kind, shape.capabilities),
    )


def _product8_tma(kind: str, gelu: str, out: str, tile: str) -> Variant:
    shape, element = TMA_TILES8[tile], ELEMENTS[kind]
    parameters = (
        Parameter("x", f"tensordesc<{element}[{shape.rows},{UNIT}]>"),
        Parameter("x_scales", "*fp32"),
        Parameter("weight", f"tensordesc<{element}[{shape.outputs},{UNIT}]>"),
        *_scales_and_bias(out),
        Parameter(
            "out", f"tensordesc<{ELEMENTS[out]}[{shape.rows},{shape.outputs}]>", written=True
        ),
        *_out_scales(out),
        Parameter("control", "*i64"),
        Parameter("rows_per_pair", "i32"),
        Parameter("scales_stride", "i32"),
        *(Parameter(name, "i32", 16) for name in ("num_out", "num_in")),
    )
    return Variant(
        product8_tma_name(kind, gelu, out, tile),
        "products8",
        "product8_tma",
        parameters,
        _constants(shape, kind, gelu, out),
        shape.num_warps,
        shape.num_stages,
        _both(kind, shape.capabilities),
    )


def _scales_and_bias(out: str) -> Iterator[Parameter]:
    yield Parameter("weight_scales", "*fp32")
    yield Parameter("bias", "*fp32", 16)
    if out != WIDE:
        yield Parameter("smooth", "*fp32", 16)


def _out_scales(out: str) -> Iterator[Parameter]:
    if out != WIDE:
        yield Parameter("out_scales", "*fp32", written=True)


def _constants(tile: Tile8, kind: str, gelu: str, out: str) -> dict[str, int | None]:
    sizes: dict[str, int | None] = {"BLOCK_ROWS": tile.rows, "BLOCK_OUT": tile.outputs}
    sizes |= {"GELU": GELU_FORMS[gelu], "LARGEST": KINDS[kind].largest}
    return sizes if out != WIDE else {**sizes, "smooth": None, "out_scales": None}


def _both(kind: str, capabilities: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(each for each in capabilities if each in KINDS[kind].capabilities)


def _add_norm8(kind: str, columns: int) -> Variant:
    copies = (
        Parameter("smooth", "*fp32", 16),
        Parameter("copy", f"*{ELEMENTS[kind]}", 16, written=True),
        Parameter("scales", "*fp32", written=True),
    )
    return add_norm_variant(
        add_norm8_name(kind, columns),
        WIDE,
        columns,
        copies,
        largest=KINDS[kind].largest,
        capabilities=KINDS[kind].capabilities,
    )


def _quantize(kind: str) -> Variant:
    parameters = (
        Parameter("x", f"*{ELEMENTS[WIDE]}", 16),
        Parameter("smooth", "*fp32", 16),
        Parameter("out", f"*{ELEMENTS[kind]}", 16, written=True),
        Parameter("scales", "*fp32", written=True),
        Parameter("control", "*i64"),
        Parameter("rows_per_pair", "i32"),
        Parameter("width", "i32", 16),
    )
    constants: dict[str, int | None] = {"ROWS": QUANTIZE_ROWS, "LARGEST": KINDS[kind].largest}
    capabilities = KINDS[kind].capabilities
    return Variant(
        quantize_name(kind),
        "quantize",
        "quantize",
        parameters,
        constants,
        capabilities=capabilities,
    )
