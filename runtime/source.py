"""Tokens as an engine reads them, whatever dtype the store holds."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from ..arrays import Array, CopyThreads, Float16, Int64
from ..bundle import BundleManifest
from ..engines.contract import Engine
from ..errors import StoreError
from ..tokens import dequantize_tokens
from .store import BadRecord, TokenStore


class TokenSource(Protocol):
    """What the pipeline asks of a `TokenStore`. Any number of threads ask at once."""

    def read(
        self, rows: Int64, out: Array, scales: Float16 | None = None, *, bad: Literal["mark"]
    ) -> list[BadRecord]:
        """Fill `out` [P, m, H] with the records of `rows`; return those that are damaged.

        Args:
            scales: float16 [P, m], to fill as well; None where the tokens are float16.
        """
        ...

    def prefetch(self, rows: Int64) -> None:
        """Say which rows are read next; returns at once."""
        ...


class Float16Tokens:
    """An int8 store for an engine that reads float16: dequantised while they are read.

    The scores are those of the int8 tokens. It costs CPU time: 45 us a record of 64 x 384 values
    (one thread of an Intel Xeon with AVX512; several share a large batch). An engine built with
    `--tokens int8` saves that.
    """

    def __init__(self, store: TokenStore):
        """`store` stays the caller's."""
        self._store = store
        self._threads = CopyThreads()

    def read(
        self,
        rows: Int64,
        out: Array,
        scales: Float16 | None = None,
        *,
        bad: Literal["raise", "mark"] = "raise",
    ) -> list[BadRecord]:
        """Fill `out` float16 [P, m, H], C-contiguous; else as `TokenStore.read`."""
        # The int8 values go where they are overwritten last, so that no second buffer is needed.
        values = out.reshape(-1).view(np.int8)[out.size :].reshape(out.shape)
        stored_scales = np.empty(out.shape[:2], np.float16)
        damaged = self._store.read(rows, values, stored_scales, bad=bad)
        self._dequantize(values, stored_scales, out)
        return damaged

    def _dequantize(self, values: Array, scales: Float16, out: Array) -> None:
        """Dequantise `values`, which are the last half of `out`'s memory, a part at a time.

        What is written for records [start, stop) ends before the values of `start` as long as
        2 * stop <= N + start: so far several threads may go in any order.
        """
        start, num_records = 0, len(out)
        while start < num_records:
            stop = max((num_records + start) // 2, start + 1)
            if self._threads.count_for(out[start:stop].nbytes) < 2:
                stop = num_records  # few enough for one thread, which goes in order

            def work(part: slice, first: int = start) -> None:
                at = slice(first + part.start, first + part.stop)
                dequantize_tokens(values[at], scales[at], out[at])

            self._threads.share(stop - start, out[start:stop].nbytes, work)
            start = stop

    def prefetch(self, rows: Int64) -> None:
        """As `TokenStore.prefetch`."""
        self._store.prefetch(rows)


class HeldTokens:
    """Records in an array of this process, read at the speed of a copy."""

    def __init__(self, rows: Int64, tokens: Array, scales: Float16 | None = None):
        """Serve `tokens` [N, m, H] and `scales` [N, m]; both stay the caller's, unchanged.

        Args:
            rows: int64 [N], ascending: the row of each record. No other row may be asked for.
        """
        self._rows, self._tokens, self._scales = rows, tokens, scales
        self._threads = CopyThreads()

    @classmethod
    def read_from(
        cls, source: TokenSource, rows: Int64, shape: tuple[int, int], dtype: str
    ) -> HeldTokens:
        """Read the records of `rows` (ascending) once; damaged ones are zeros."""
        tokens = np.empty((len(rows), *shape), dtype)
        scales = np.empty((len(rows), shape[0]), np.float16) if dtype == "int8" else None
        source.read(rows, tokens, scales, bad="mark")
        return cls(rows, tokens, scales)

    def read(
        self,
        rows: Int64,
        out: Array,
        scales: Float16 | None = None,
        *,
        bad: Literal["raise", "mark"] = "raise",
    ) -> list[BadRecord]:
        """Copy the records of `rows` into `out`; none is ever bad."""
        positions = np.searchsorted(self._rows, rows)
        self._threads.take(self._tokens, positions, out)
        if self._scales is not None and scales is not None:
            self._threads.take(self._scales, positions, scales)
        return []

    def prefetch(self, rows: Int64) -> None:
        """Everything is in memory already."""


def record_bytes(shape: tuple[int, int], dtype: str) -> int:
    """Return the bytes of one record of (m, H) values, its scales included."""
    num_tokens, hidden = shape
    scale_bytes = 2 * num_tokens if dtype == "int8" else 0
    return num_tokens * hidden * np.dtype(dtype).itemsize + scale_bytes


def check_store(engine: Engine, store: TokenStore) -> None:
    """Check that `store` holds what `engine` was trained to read.

    An engine that takes float16 tokens reads an int8 store as well (see `Float16Tokens`).

    Raises:
        StoreError: another encoder made the tokens (both fingerprints named), their shape
            differs, or the engine takes int8 tokens and the store holds none.
    """
    faults = encoder_faults(store, engine.manifest.bundle, "engine")
    hint = (
        "tokens of two encoders do not compare: index the same images with this one, "
        f"edje store ids {store.path} > ids.txt && "
        "edje index ENGINE_OR_BUNDLE IMAGES --into NEW_STORE --from ids.txt"
    )
    dtype = store.layout.dtype
    if engine.manifest.token_dtype == "int8" and dtype != "int8":
        faults.append(f"dtype: the store holds {dtype} tokens, the engine reads int8 ones")
        hint += " --dtype int8; or build an engine without --tokens int8, which reads both"
    if faults:
        raise StoreError(
            f"the store {store.path} was not made for this engine", faults=faults, hint=hint
        )


def encoder_faults(store: TokenStore, bundle: BundleManifest, reader: str) -> list[str]:
    """Return why a store's tokens are none of a model's; `reader`: its `engine` or `bundle`."""
    faults = []
    theirs, ours = store.fingerprint_encoder, bundle.fingerprint_encoder
    if theirs != ours:
        faults.append(f"encoder: the store's is {theirs}, the {reader}'s is {ours}")
    got, expected = list(store.record_shape), [bundle.sizes.num_tokens, bundle.sizes.hidden]
    if got != expected:
        faults.append(f"tokens: the store holds {got} an image, the {reader} reads {expected}")
    return faults


def tokens_for(engine: Engine, store: TokenStore) -> TokenSource:
    """Return what reads the store's tokens as the engine takes them."""
    return store if engine.manifest.token_dtype == "int8" else float16_tokens(store)


def float16_tokens(store: TokenStore) -> TokenStore | Float16Tokens:
    """Return what reads the store's records as float16: the store itself where they are."""
    return store if store.layout.dtype == "float16" else Float16Tokens(store)
