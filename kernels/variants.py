"""What `make kernels` builds: every kernel, for which types and sizes, and for which GPUs."""

from __future__ import annotations

from .layer_variants import ACTIVATIONS, layer_variants
from .layer_variants8 import eight_bit_variants
from .variant import ELEMENTS, Parameter, Variant

SOURCES = (
    "assemble.py",
    "attention.py",
    "gather_scatter.py",
    "norms.py",
    "products.py",
    "products8.py",
    "quantize.py",
    "score.py",
    "shallow_score.py",
)
# Of a gather or scatter, 8 kB a program: four loads of 16 bytes in flight in each of 128 threads.
COPY_VECTORS = 512
ASSEMBLE_COLUMNS = (512, 1024)


def gather_name(token_dtype: str, row_dtype: str) -> str:
    """Return the name of the variant for these dtypes, as NumPy names them."""
    return f"gather_tokens_{token_dtype}_by_{row_dtype}"


def scatter_name(token_dtype: str, place_dtype: str) -> str:
    """Return the name of the variant for these dtypes, as NumPy names them."""
    return f"scatter_tokens_{token_dtype}_by_{place_dtype}"


def assemble_name(token_dtype: str, out_dtype: str, columns: int) -> str:
    """Return the name of the variant for these dtypes and rows of at most `columns` values."""
    return f"assemble_{token_dtype}_to_{out_dtype}_{columns}"


def all_variants() -> tuple[Variant, ...]:
    """Return every kernel that is built, in a fixed order."""
    return (
        *(_gather(token, row) for token in ("float16", "int8") for row in ("int32", "int64")),
        *(_scatter(token, place) for token in ("float16", "int8") for place in ("int32", "int64")),
        *(
            _assemble(token, out, columns)
            for token in ("float16", "int8")
            for out in ("float16", "bfloat16")
            for columns in ASSEMBLE_COLUMNS
        ),
        *(variant for dtype in ACTIVATIONS for variant in layer_variants(dtype)),
        *eight_bit_variants(),
    )


def _gather(token_dtype: str, row_dtype: str) -> Variant:
    rows = Parameter("rows", _address(row_dtype))
    return _copy("gather_tokens", gather_name(token_dtype, row_dtype), token_dtype, rows)


def _scatter(token_dtype: str, place_dtype: str) -> Variant:
    places = Parameter("places", _address(place_dtype))
    return _copy("scatter_tokens", scatter_name(token_dtype, place_dtype), token_dtype, places)


def _address(dtype: str) -> str:
    return "*i32" if dtype == "int32" else "*i64"


def _copy(function: str, name: str, token_dtype: str, numbers: Parameter) -> Variant:
    """Return a gather or a scatter, which differ in whose places the `numbers` are."""
    has_scales = token_dtype == "int8"
    parameters = [
        Parameter("tokens", "*i32", 16),
        *([Parameter("scales", "*i16")] if has_scales else []),
        numbers,
        Parameter("out_tokens", "*i32", 16, written=True),
        *([Parameter("out_scales", "*i16", written=True)] if has_scales else []),
        Parameter("num_records", "i64"),
        Parameter("record_vectors", "i32"),
        *([Parameter("num_scales", "i32")] if has_scales else []),
    ]
    constants: dict[str, int | None] = {"VECTORS": COPY_VECTORS}
    if not has_scales:
        constants |= {"scales": None, "out_scales": None, "num_scales": None}
    return Variant(name, "gather_scatter", function, tuple(parameters), constants)


def _assemble(token_dtype: str, out_dtype: str, columns: int) -> Variant:
    has_scales = token_dtype == "int8"
    sizes = ("num_pairs", "num_queries", "text_slots", "num_tokens", "num_records", "num_fresh")
    parameters = [
        *(Parameter(name, "*i32") for name in ("text_ids", "text_length", "query_of_pair")),
        Parameter("tokens", f"*{ELEMENTS[token_dtype]}", 16),
        *([Parameter("scales", "*fp16")] if has_scales else []),
        Parameter("fresh", f"*{ELEMENTS[token_dtype]}", 16),
        *([Parameter("fresh_scales", "*fp16")] if has_scales else []),
        Parameter("rows", "*i32"),
        *(Parameter(name, "*fp32", 16) for name in ("words", "positions")),
        *(Parameter(name, "*fp32", 16) for name in ("norm_weight", "norm_bias")),
        Parameter("hidden_states", f"*{ELEMENTS[out_dtype]}", 16, written=True),
        Parameter("lengths", "*i32", written=True),
        Parameter("control", "*i64", written=True),
        Parameter("scores", "i64"),
        *(Parameter(name, "i32") for name in (*sizes, "vocab_size")),
        *(Parameter(name, "i32") for name in ("max_positions", "sep_id")),
        *(Parameter(name, "i32", 16) for name in ("hidden", "width")),
        Parameter("epsilon", "fp32"),
    ]
    constants: dict[str, int | None] = {"SLOTS": 4, "COLUMNS": columns}
    if not has_scales:
        constants |= {"scales": None, "fresh_scales": None}
    name = assemble_name(token_dtype, out_dtype, columns)
    num_warps = 4 if columns == ASSEMBLE_COLUMNS[0] else 8  # with 4, long rows spill
    return Variant(name, "assemble", "assemble", tuple(parameters), constants, num_warps)
