"""Let Triton's interpreter compute as a GPU does where it differs. Called in its own process.

- It holds bfloat16 as uint16: `tl.dot` multiplies those as if they were integers, and rounding
  cuts off.
- NumPy's products sum a row otherwise at the edge of their blocks than within. A tensor core does
  not: a row's sum is the same wherever the row lies in its tile. Sums in float64, rounded once, are
  so as well.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np


def repair_numbers() -> None:
    """Mend `tl.dot` of 16-bit and 32-bit floats, and rounding to bfloat16."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    mended = (tl.float16, tl.bfloat16, tl.float32)

    def widened(operand: Any) -> np.ndarray:
        if operand.dtype.scalar != tl.bfloat16:
            return operand.data.astype(np.float64)
        return (operand.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def repaired_dot(self: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        if a.dtype.scalar not in mended:
            return dot(self, a, b, total, *rest)
        product = np.matmul(widened(a), widened(b)).astype(np.float32)
        return TensorHandle(product + total.data, total.dtype.scalar)

    def repaired_cast(self: Any, source: Any, dst_type: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, source, dst_type)
        return TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot = repaired_dot
    InterpreterBuilder.cast_impl = repaired_cast
