"""Attention as a typed call: which kernel serves a layout of slots, checks, launch.

As in `layers`, whose rules hold here.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..arrays import DeviceArray
from .device.contract import Stream
from .launch import (
    MOST_SLOTS,
    KernelLibrary,
    array_faults,
    bounds_faults,
    choice_faults,
    raise_faults,
    rows_faults,
    stride_faults,
)
from .layer_variants import ACTIVATIONS, ATTENTION_HEADS, attention_name, attention_sizes


class Attention:
    """`references.attention` on the device, for one layout of a pair's slots."""

    def __init__(
        self,
        library: KernelLibrary,
        *,
        dtype: str,
        head: int,
        num_heads: int,
        text_slots: int,
        num_slots: int,
        num_queries: int,
    ):
        """Load the kernel.

        Args:
            dtype: `float16` or `bfloat16`; scores and sums are float32.
            head: values of a head: 32 or 64.
            text_slots: the slots at a pair's begin of which `lengths` says how many are real.
            num_slots: of a pair, text included.
            num_queries: of a pair: all slots, or 1 for the CLS row.

        Raises:
            EngineError: choices that no kernel takes (all at once), or no kernel for this GPU.
        """
        faults = _attention_faults(dtype, head, num_heads, text_slots, num_slots, num_queries)
        raise_faults("attention", faults)
        self._block, most_slots = attention_sizes(num_queries, num_slots)
        self._kernel = library.kernel(attention_name(dtype, head, self._block, most_slots))
        self._dtype, self._values = dtype, head * num_heads
        self._sizes = {
            "num_queries": num_queries,
            "num_slots": num_slots,
            "text_slots": text_slots,
            "num_heads": num_heads,
        }

    def enqueue(
        self,
        queries: DeviceArray,
        keys: DeviceArray,
        values: DeviceArray,
        out: DeviceArray,
        lengths: DeviceArray,
        control: DeviceArray,
        *,
        num_pairs: int,
        stream: Stream,
        query_stride: int | None = None,
        key_stride: int | None = None,
    ) -> None:
        """Write each query's mix of values, head beside head; returns at once.

        Args:
            queries: [at least the queries of the pairs, width], on 16 bytes, scaled already by
                1 / sqrt(head).
            keys, values: [at least the slots of the pairs, width], on 16 bytes. Padded text keys
                are not read.
            out: [at least the queries, width], on 16 bytes; columns past the heads stay as they
                are.
            lengths: int32 [at least the pairs]: real text slots of each pair.
            control: int64 [2].
            num_pairs: the most pairs that `control` will say.
            query_stride, key_stride: elements from a row of queries, or of keys and of values, to
                the next, multiples of 16; None: the row's width. Within rows that hold queries,
                keys and values it is three times as much.

        Raises:
            EngineError: arrays that do not fit (all faults at once).
        """
        query_stride = queries.shape[-1] if query_stride is None else query_stride
        key_stride = keys.shape[-1] if key_stride is None else key_stride
        arrays = (queries, keys, values, out, lengths, control)
        raise_faults("attention", self._faults(arrays, num_pairs, query_stride, key_stride))
        num_queries = self._sizes["num_queries"]
        self._kernel.launch(
            stream,
            num_pairs * self._sizes["num_heads"] * -(-num_queries // self._block),
            queries=queries.address,
            keys=keys.address,
            values=values.address,
            out=out.address,
            lengths=lengths.address,
            control=control.address,
            query_stride=query_stride,
            query_pair_stride=query_stride * num_queries,
            key_stride=key_stride,
            out_stride=out.shape[1],
            **self._sizes,
        )

    def _faults(
        self, arrays: tuple[DeviceArray, ...], num_pairs: int, query_stride: int, key_stride: int
    ) -> Iterator[str]:
        queries, keys, values, out, lengths, control = arrays
        num_queries = num_pairs * self._sizes["num_queries"]
        num_slots, width = num_pairs * self._sizes["num_slots"], out.shape[-1]
        yield from rows_faults("queries", queries, self._dtype, num_queries, width)
        yield from rows_faults("keys", keys, self._dtype, num_slots, width)
        yield from rows_faults("values", values, self._dtype, num_slots, width)
        yield from rows_faults("out", out, self._dtype, num_queries, width)
        yield from array_faults("lengths", lengths, "int32", (max(num_pairs, *lengths.shape),))
        yield from array_faults("control", control, "int64", (2,))
        if width < self._values:
            yield f"width: got {width}, expected at least the heads' {self._values}"
        yield from stride_faults("query_stride", query_stride, width)
        yield from stride_faults("key_stride", key_stride, width)
        yield from bounds_faults("slots", num_slots, MOST_SLOTS)


def _attention_faults(
    dtype: str, head: int, num_heads: int, text_slots: int, num_slots: int, num_queries: int
) -> Iterator[str]:
    yield from choice_faults("dtype", dtype, ACTIVATIONS)
    if head not in ATTENTION_HEADS:
        yield f"head: got {head}, expected one of {list(ATTENTION_HEADS)}"
    yield from bounds_faults("num_heads", num_heads, 2**10)
    yield from bounds_faults("num_slots", num_slots, 2**16)
    yield from bounds_faults("text_slots", text_slots, num_slots)
    yield from bounds_faults("num_queries", num_queries, num_slots)
