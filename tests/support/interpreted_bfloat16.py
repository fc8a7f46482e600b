"""Let Triton's interpreter compute with bfloat16 as a GPU does.

It holds bfloat16 as uint16: `tl.dot` multiplies those as if they were integers, and rounding cuts
off. Called in the interpreter's own process, after `TRITON_INTERPRET` was set.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np


def repair_bfloat16() -> None:
    """Let `tl.dot` widen its operands to float32, and rounding go to the nearest."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        wide = (operand.data.astype(np.uint32) << 16).view(np.float32)
        return TensorHandle(wide, tl.float32)

    def repaired_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def repaired_cast(self: Any, source: Any, dst_type: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, source, dst_type)
        return TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot = repaired_dot
    InterpreterBuilder.cast_impl = repaired_cast
