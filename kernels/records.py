"""Whole records within device memory, as typed calls: `GatherTokens`, `ScatterTokens`.

As in `operations`, everything is allocated by the caller, and a call only queues work on a stream.
Row numbers are not checked here: the kernels never touch memory outside an array.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from ..arrays import DeviceArray
from .device.contract import Stream
from .launch import (
    KernelLibrary,
    array_faults,
    choice_faults,
    raise_faults,
    scales_faults,
)
from .variants import COPY_VECTORS, gather_name, scatter_name

VECTOR_BYTES = 16


class GatherTokens:
    """`references.gather_tokens` on the device, for one dtype of tokens and of row numbers."""

    def __init__(self, library: KernelLibrary, *, token_dtype: str, row_dtype: str = "int64"):
        """Load the kernel.

        Args:
            token_dtype: `float16`, or `int8` with scales.
            row_dtype: `int32` or `int64`.

        Raises:
            EngineError: other dtypes, or no kernel for this GPU.
        """
        raise_faults("gather_tokens", _dtype_faults(token_dtype, "row_dtype", row_dtype))
        self._token_dtype, self._row_dtype = token_dtype, row_dtype
        self._kernel = library.kernel(gather_name(token_dtype, row_dtype))

    def enqueue(
        self,
        records: DeviceArray,
        rows: DeviceArray,
        out: DeviceArray,
        *,
        stream: Stream,
        scales: DeviceArray | None = None,
        out_scales: DeviceArray | None = None,
    ) -> None:
        """Copy record `rows[p]` to place p of `out` in the order of `stream`; returns at once.

        The arrays belong to the caller and must live, unchanged, until the stream has passed.

        Args:
            records: [R, m, H] of the token dtype, on 16 bytes; a record is a multiple of 16 bytes.
            rows: [P] of the row dtype; a negative row leaves its place, one past the store
                makes it NaN.
            out: [P, m, H], written.
            scales, out_scales: float16 [R, m] and [P, m], with int8 tokens and only with them.

        Raises:
            EngineError: arrays that do not fit (all faults at once).
        """
        source = _Records("records", records, "scales", scales)
        target = _Records("out", out, "out_scales", out_scales)
        faults = _copy_faults(source, target, "rows", rows, self._token_dtype, self._row_dtype)
        raise_faults("gather_tokens", faults)
        values = _copy_values(source, target, num_records=records.shape[0])
        num_programs = rows.shape[0] * _parts_of_a_record(records)
        self._kernel.launch(stream, num_programs, rows=rows.address, **values)


class ScatterTokens:
    """`references.scatter_tokens` on the device, for one dtype of tokens and of places."""

    def __init__(self, library: KernelLibrary, *, token_dtype: str, place_dtype: str = "int64"):
        """Load the kernel.

        Args:
            token_dtype: `float16`, or `int8` with scales.
            place_dtype: `int32` or `int64`.

        Raises:
            EngineError: other dtypes, or no kernel for this GPU.
        """
        raise_faults("scatter_tokens", _dtype_faults(token_dtype, "place_dtype", place_dtype))
        self._token_dtype, self._place_dtype = token_dtype, place_dtype
        self._kernel = library.kernel(scatter_name(token_dtype, place_dtype))

    def enqueue(
        self,
        tokens: DeviceArray,
        places: DeviceArray,
        pool: DeviceArray,
        *,
        stream: Stream,
        scales: DeviceArray | None = None,
        pool_scales: DeviceArray | None = None,
    ) -> None:
        """Copy record p of `tokens` to place `places[p]` of `pool`, as `GatherTokens.enqueue` does.

        The caller vouches that no two records go to the same place, and that none goes to where
        `tokens` lies: a block at the end of the pool's own memory may be copied into the pool.

        Args:
            tokens: [P, m, H] of the token dtype, on 16 bytes; a record is a multiple of 16 bytes.
            places: [P] of the place dtype; a place outside the pool, negative or past it, is
                skipped.
            pool: [R, m, H], written at those places only.
            scales, pool_scales: float16 [P, m] and [R, m], with int8 tokens and only with them.

        Raises:
            EngineError: arrays that do not fit (all faults at once).
        """
        source = _Records("tokens", tokens, "scales", scales)
        target = _Records("pool", pool, "pool_scales", pool_scales)
        faults = _copy_faults(
            target, source, "places", places, self._token_dtype, self._place_dtype
        )
        raise_faults("scatter_tokens", faults)
        values = _copy_values(source, target, num_records=pool.shape[0])
        num_programs = places.shape[0] * _parts_of_a_record(pool)
        self._kernel.launch(stream, num_programs, places=places.address, **values)


@dataclass(frozen=True, slots=True)
class _Records:
    """Tokens and perhaps their scales, with the names that the caller has for them."""

    name: str
    tokens: DeviceArray
    scales_name: str
    scales: DeviceArray | None


def _parts_of_a_record(records: DeviceArray) -> int:
    return -(-_vectors_of_a_record(records) // COPY_VECTORS)


def _vectors_of_a_record(records: DeviceArray) -> int:
    return math.prod(records.shape[1:]) * records.dtype.itemsize // VECTOR_BYTES


def _copy_values(source: _Records, target: _Records, *, num_records: int) -> dict[str, int]:
    """Return what both kernels take, but for the row numbers."""
    values = {
        "tokens": source.tokens.address,
        "out_tokens": target.tokens.address,
        "num_records": num_records,
        "record_vectors": _vectors_of_a_record(source.tokens),
    }
    if source.scales is not None and target.scales is not None:
        values |= {"scales": source.scales.address, "out_scales": target.scales.address}
        values["num_scales"] = source.tokens.shape[1]
    return values


def _dtype_faults(token_dtype: str, name: str, dtype: str) -> Iterator[str]:
    return chain(
        choice_faults("token_dtype", token_dtype, ("float16", "int8")),
        choice_faults(name, dtype, ("int32", "int64")),
    )


def _copy_faults(
    store: _Records,
    batch: _Records,
    name: str,
    rows: DeviceArray,
    token_dtype: str,
    row_dtype: str,
) -> Iterator[str]:
    """Yield what does not fit: a store of R records, a batch of P, and its row numbers."""
    if len(store.tokens.shape) != 3 or len(rows.shape) != 1 or not rows.shape[0]:
        shapes = f"{store.tokens.shape}, {rows.shape}"
        yield f"{store.name}, {name}: got {shapes}, expected [R, m, H], [P]"
        return
    (num_pairs,), (num_records, num_tokens, hidden) = rows.shape, store.tokens.shape
    yield from array_faults(store.name, store.tokens, token_dtype, store.tokens.shape)
    yield from array_faults(name, rows, row_dtype, rows.shape)
    yield from array_faults(batch.name, batch.tokens, token_dtype, (num_pairs, num_tokens, hidden))
    for side, count in ((store, num_records), (batch, num_pairs)):
        shape, has_scales = (count, num_tokens), token_dtype == "int8"
        yield from scales_faults(side.scales_name, side.scales, has_scales, shape)
    record_bytes = num_tokens * hidden * store.tokens.dtype.itemsize
    if record_bytes % VECTOR_BYTES:
        yield f"{store.name}: {record_bytes} bytes each, expected a multiple of {VECTOR_BYTES}"
