"""Let Triton's interpreter compute as a GPU does where it differs. Called in its own process.

- It holds bfloat16 as uint16: `tl.dot` multiplies those as if they were integers, and rounding
  cuts off.
- Its E4M3 are uint8; it rounds to them otherwise, and multiplies them in float16.
- Its products of int8 go through no library: slow. Sums in float64 are exact all the same.
- NumPy's products sum a row otherwise at the edge of their blocks than within. A tensor core does
  not: a row's sum is the same wherever the row lies in its tile. Sums in float64, rounded once, are
  so as well.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np


def repair_numbers() -> None:
    """Mend `tl.dot`, and rounding to bfloat16 and E4M3."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    convert = InterpreterBuilder.create_fp_to_fp
    mended = (tl.float16, tl.bfloat16, tl.float32, tl.int8, tl.float8e4nv)
    kinds = {tl.bfloat16: ml_dtypes.bfloat16, tl.float8e4nv: ml_dtypes.float8_e4m3fn}

    def widened(operand: Any) -> np.ndarray:
        kind = kinds.get(operand.dtype.scalar)
        values = operand.data if kind is None else operand.data.view(kind)
        return values.astype(np.float64)

    def repaired_dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        if a.dtype.scalar not in mended:
            return dot(self, a, b, total, *rest)
        product = np.matmul(widened(a), widened(b)).astype(total.data.dtype)
        return TensorHandle(product + total.data, total.dtype.scalar)

    def repaired_cast(self: Any, source: Any, dst_type: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, source, dst_type)
        return TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)

    def repaired_convert(self: Any, source: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dst_type.scalar != tl.float8e4nv:
            return convert(self, source, dst_type, rounding_mode)
        # A GPU's conversion ends at the largest number, NumPy's goes on to NaN.
        cut = np.clip(source.data, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return TensorHandle(cut.view(np.uint8), tl.float8e4nv)

    InterpreterBuilder.create_dot = repaired_dot
    InterpreterBuilder.create_fp_to_fp = repaired_convert
    InterpreterBuilder.cast_impl = repaired_cast
