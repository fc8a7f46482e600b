"""Memory for a batch of records, used again and again by whoever reads a whole store."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .layout import StoreLayout

MAX_BATCH_BYTES = 32 << 20


class BatchBuffers:
    """Buffers for up to `size` records of a layout: as many as fit 32 MiB, and no more than N."""

    def __init__(self, layout: StoreLayout, num_records: int):
        record_bytes = layout.record_bytes + layout.scale_bytes
        self.size = max(1, min(num_records, MAX_BATCH_BYTES // record_bytes))
        shape = (self.size, layout.num_tokens, layout.hidden)
        self._tokens = np.empty(shape, layout.dtype)
        self._scales = np.empty(shape[:2], np.float16) if layout.scale_bytes else None

    def views(self, num_records: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float16] | None]:
        """Return float16 or int8 [N, m, H] and, for int8, float16 [N, m]; overwritten next time."""
        scales = self._scales
        return self._tokens[:num_records], None if scales is None else scales[:num_records]
