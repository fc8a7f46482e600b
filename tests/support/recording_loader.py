"""A loader of kernels that runs nothing and records what it was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edje.arrays import DeviceArray


@dataclass
class RecordingLoader:
    """Records loaded cubins, and the keywords of every launch with its symbol and stream."""

    loaded: list[bytes] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)

    def load_module(self, code: bytes) -> RecordingLoader._Module:
        self.loaded.append(code)
        return RecordingLoader._Module(self)

    @dataclass(frozen=True)
    class _Module:
        loader: RecordingLoader
        symbol: str = ""

        def kernel(self, symbol: str, shared_bytes: int = 0) -> RecordingLoader._Module:
            return RecordingLoader._Module(self.loader, symbol)

        def launch(self, stream: object, *, arguments: Sequence[np.generic], **launch: Any) -> None:
            call = {"symbol": self.symbol, "stream": stream, "arguments": arguments, **launch}
            self.loader.launches.append(call)


def fake_memory(address: int, shape: tuple[int, ...], dtype: str) -> DeviceArray:
    """Return device memory that does not exist."""
    return DeviceArray(address, shape, np.dtype(dtype))
