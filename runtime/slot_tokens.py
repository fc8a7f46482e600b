"""How a batch's visual tokens get from the store to the engine: one object a slot.

`StreamedTokens` sends every record with every batch. Where a pool keeps records on the device,
`residency.pooled_tokens.PooledTokens` sends only what the pool has not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..engines.int8_tokens import not_finite
from .device.protocol import Device, Stream
from .store import BadRecord
from .token_source import TokenSource

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]

NONE: Int64 = np.empty(0, np.int64)


class Gathered(NamedTuple):
    """What a batch cannot be scored by.

    Attributes:
        damaged: records that could not be read; `position` is the pair's place in the batch.
        not_finite: int64: pairs whose tokens hold NaN or infinity, where that was looked for.
    """

    damaged: Sequence[BadRecord]
    not_finite: Int64


class SlotTokens(Protocol):
    """The tokens of one slot's batch; owned, as the slot, by who took the slot from the ring."""

    def gather(self, source: TokenSource, rows: Int64, *, check_finite: bool) -> Gathered:
        """Bring the records of `rows` (int64 [P]) into pinned memory, as far as they are needed."""
        ...

    def upload(self, stream: Stream) -> None:
        """Copy what was gathered to the device, in the order of `stream`."""
        ...

    def assemble(self, stream: Stream) -> None:
        """Put the batch's tokens together where the engine reads them, in the order of `stream`."""
        ...

    def engine(self, num_pairs: int) -> tuple[Array, Array | None]:
        """Return tokens [P, m, H] and scales [P, m] as the engine sees them; no copy."""
        ...

    def landed(self) -> None:
        """Take notice that the batch's scores have come back: all its copies are sound."""
        ...

    def let_go(self) -> None:
        """Give up what the batch held; no stream works on it any more. May be called twice."""
        ...


class Staged:
    """One tensor of a slot: pinned host memory and its mirror where the engine runs."""

    def __init__(self, device: Device, num_elements: int, dtype: str):
        self._pinned = device.pinned(num_elements, np.dtype(dtype))
        self._mirror = device.mirror(self._pinned)

    def host(self, *shape: int) -> Array:
        """Return the host side as `shape`; no copy."""
        return self._pinned.view(shape)

    def engine(self, *shape: int) -> Array:
        """Return the engine's side as `shape`; no copy."""
        return self._mirror.view(shape)

    def upload(self, stream: Stream, num_elements: int) -> None:
        stream.upload(self._mirror, self._pinned, num_elements)

    def download(self, stream: Stream, num_elements: int) -> None:
        stream.download(self._pinned, self._mirror, num_elements)


class StagedRecords:
    """Room for `max_records` records: tokens, and scales where they are int8."""

    def __init__(self, device: Device, max_records: int, shape: tuple[int, int], dtype: str):
        num_tokens, hidden = self._shape = shape
        self._tokens = Staged(device, max_records * num_tokens * hidden, dtype)
        scaled = dtype == "int8"
        self._scales = Staged(device, max_records * num_tokens, "float16") if scaled else None

    def host(self, num_records: int) -> tuple[Array, Array | None]:
        """Return where the store writes: tokens [N, m, H], scales float16 [N, m]; pinned."""
        scales = None if self._scales is None else self._scales.host(num_records, self._shape[0])
        return self._tokens.host(num_records, *self._shape), scales

    def engine(self, num_records: int) -> tuple[Array, Array | None]:
        """Return the same on the engine's side."""
        scales = None if self._scales is None else self._scales.engine(num_records, self._shape[0])
        return self._tokens.engine(num_records, *self._shape), scales

    def upload(self, stream: Stream, num_records: int) -> None:
        self._tokens.upload(stream, num_records * math.prod(self._shape))
        if self._scales is not None:
            self._scales.upload(stream, num_records * self._shape[0])


class StreamedTokens:
    """Every record comes from the store with every batch."""

    def __init__(self, device: Device, max_pairs: int, shape: tuple[int, int], dtype: str):
        self._records = StagedRecords(device, max_pairs, shape, dtype)
        self._num_pairs = 0

    def gather(self, source: TokenSource, rows: Int64, *, check_finite: bool) -> Gathered:
        self._num_pairs = len(rows)
        tokens, scales = self._records.host(len(rows))
        damaged = source.read(rows, tokens, scales, bad="mark")
        return Gathered(damaged, not_finite(tokens, scales) if check_finite else NONE)

    def upload(self, stream: Stream) -> None:
        self._records.upload(stream, self._num_pairs)

    def assemble(self, stream: Stream) -> None:
        """Nothing: the upload went where the engine reads."""

    def engine(self, num_pairs: int) -> tuple[Array, Array | None]:
        return self._records.engine(num_pairs)

    def landed(self) -> None:
        """Nothing was kept."""

    def let_go(self) -> None:
        """Nothing was held."""
