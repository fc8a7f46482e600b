"""The kernels as typed calls: check arrays in device memory, count programs, launch.

`GatherTokens` and `ScatterTokens` are in `records`, what computes with values is here.
Everything is allocated by the caller, at set-up; a call only queues work on a stream. Where a
call would read values (row numbers, ids), the caller vouches for nothing: the kernels never read
outside an array, and what an index outside its table touches becomes NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..arrays import DeviceArray
from .device.contract import Stream
from .launch import (
    KernelLibrary,
    array_faults,
    choice_faults,
    raise_faults,
    rows_faults,
    scales_faults,
)
from .variants import (
    ASSEMBLE_COLUMNS,
    assemble_name,
)


@dataclass(frozen=True, slots=True)
class DeviceEmbeddings:
    """`references.Embeddings` in device memory: the same fields, owned by the caller."""

    words: DeviceArray
    positions: DeviceArray
    norm_weight: DeviceArray
    norm_bias: DeviceArray
    epsilon: float
    sep_id: int


class Assemble:
    """`references.assemble` on the device, for one model and one pair of dtypes."""

    def __init__(
        self,
        library: KernelLibrary,
        embeddings: DeviceEmbeddings,
        *,
        token_dtype: str,
        out_dtype: str,
        width: int,
    ):
        """Load the kernel.

        Args:
            embeddings: must live as long as this object is used.
            token_dtype: `float16`, or `int8` with scales.
            out_dtype: `float16` or `bfloat16`; sums are float32 either way.
            width: values of a row of hidden states, a multiple of 16: H, and zeros after them.

        Raises:
            EngineError: tables or dtypes that no kernel takes (all faults at once).
        """
        hidden = embeddings.words.shape[-1]
        raise_faults("assemble", _table_faults(embeddings, token_dtype, out_dtype, width))
        columns = min(size for size in ASSEMBLE_COLUMNS if size >= width)
        self._kernel = library.kernel(assemble_name(token_dtype, out_dtype, columns))
        self._token_dtype, self._out_dtype = token_dtype, out_dtype
        self._hidden, self._width = hidden, width
        self._slots_per_program = int(self._kernel.constants["SLOTS"] or 1)
        tables = ("words", "positions", "norm_weight", "norm_bias")
        self._constants: dict[str, float] = {
            **{name: getattr(embeddings, name).address for name in tables},
            "vocab_size": embeddings.words.shape[0],
            "max_positions": embeddings.positions.shape[1],
            "sep_id": embeddings.sep_id,
            "hidden": hidden,
            "width": width,
            "epsilon": embeddings.epsilon,
        }

    def enqueue(
        self,
        text_ids: DeviceArray,
        text_length: DeviceArray,
        query_of_pair: DeviceArray,
        records: DeviceArray,
        rows: DeviceArray,
        hidden_states: DeviceArray,
        *,
        lengths: DeviceArray,
        control: DeviceArray,
        scores: DeviceArray,
        stream: Stream,
        scales: DeviceArray | None = None,
        fresh: DeviceArray | None = None,
        fresh_scales: DeviceArray | None = None,
    ) -> None:
        """Write P pairs' hidden states, and what later steps ask of the batch; returns at once.

        The arrays are the caller's and must live, unchanged, until the stream has passed.

        Args:
            text_ids, text_length, query_of_pair: int32 [Q, T], [Q], [P], as in a batch.
            records: [R, m, H] of the token dtype, on 16 bytes: a store in device memory, or a
                batch's own tokens.
            rows: int32 [P], the record of each pair: 0, 1, ... for a batch's own tokens; R + f is
                record f of `fresh`.
            hidden_states: [at least P * (T + m + 1), width] of the output dtype, on 16 bytes,
                written; bfloat16 may be called uint16.
            lengths: int32 [at least P], written: the text length of each pair.
            control: int64 [2], written: the address of `scores`, and P.
            scores: float32 [at least P]: where `Score` writes.
            scales: float16 [R, m], with int8 tokens and only with them.
            fresh, fresh_scales: more records, [F, m, H] and [F, m]; None: there are no others.

        Raises:
            EngineError: arrays that do not fit (all faults at once).
        """
        batch, more = (text_ids, text_length, query_of_pair), (fresh, fresh_scales)
        results = (hidden_states, lengths, control, scores)
        raise_faults("assemble", self._faults(batch, (records, scales), more, rows, results))
        sizes = _sizes(text_ids, query_of_pair, records, fresh)
        num_slots = sizes["num_pairs"] * (sizes["text_slots"] + sizes["num_tokens"] + 1)
        self._kernel.launch(
            stream,
            -(-num_slots // self._slots_per_program),
            text_ids=text_ids.address,
            text_length=text_length.address,
            query_of_pair=query_of_pair.address,
            tokens=records.address,
            fresh=(records if fresh is None else fresh).address,
            rows=rows.address,
            hidden_states=hidden_states.address,
            lengths=lengths.address,
            control=control.address,
            scores=scores.address,
            **sizes,
            **self._constants,
            **_scale_addresses(scales, fresh_scales),
        )

    def _faults(
        self,
        batch: tuple[DeviceArray, DeviceArray, DeviceArray],
        held: tuple[DeviceArray, DeviceArray | None],
        fresh: tuple[DeviceArray | None, DeviceArray | None],
        rows: DeviceArray,
        results: tuple[DeviceArray, DeviceArray, DeviceArray, DeviceArray],
    ) -> Iterator[str]:
        (ids, length, query_of_pair), (records, scales) = batch, held
        if (len(ids.shape), len(query_of_pair.shape), len(records.shape)) != (2, 1, 3):
            shapes = [ids.shape, query_of_pair.shape, records.shape]
            yield f"text_ids, query_of_pair, records: got {shapes}, expected [Q, T], [P], [R, m, H]"
            return
        num_pairs, (num_records, num_tokens, _) = query_of_pair.shape[0], records.shape
        num_slots = ids.shape[1] + num_tokens + 1
        yield from array_faults("text_ids", ids, "int32", ids.shape)
        yield from array_faults("text_length", length, "int32", ids.shape[:1])
        yield from array_faults("query_of_pair", query_of_pair, "int32", (num_pairs,))
        shape = (num_records, num_tokens, self._hidden)
        yield from array_faults("records", records, self._token_dtype, shape)
        yield from array_faults("rows", rows, "int32", (num_pairs,))
        has_scales = self._token_dtype == "int8"
        yield from scales_faults("scales", scales, has_scales, shape[:2])
        if fresh[0] is not None:
            shape = (fresh[0].shape[0], *shape[1:])
            yield from array_faults("fresh", fresh[0], self._token_dtype, shape)
            yield from scales_faults("fresh_scales", fresh[1], has_scales, shape[:2])
        hidden_states, lengths, control, scores = results
        least = num_pairs * num_slots
        yield from rows_faults("hidden_states", hidden_states, self._out_dtype, least, self._width)
        yield from array_faults("control", control, "int64", (2,))
        for name, array, dtype in (("lengths", lengths, "int32"), ("scores", scores, "float32")):
            yield from array_faults(name, array, dtype, (max(num_pairs, *array.shape),))
        if not 0 < num_pairs * num_slots < 2**31 - 8:
            yield f"pairs: got {num_pairs} of {num_slots} slots, expected 1 to 2^31 slots together"


def _sizes(
    text_ids: DeviceArray, pairs: DeviceArray, records: DeviceArray, fresh: DeviceArray | None
) -> dict[str, int]:
    return {
        "num_pairs": pairs.shape[0],
        "num_queries": text_ids.shape[0],
        "text_slots": text_ids.shape[1],
        "num_tokens": records.shape[1],
        "num_records": records.shape[0],
        "num_fresh": 0 if fresh is None else fresh.shape[0],
    }


def _scale_addresses(scales: DeviceArray | None, fresh: DeviceArray | None) -> dict[str, int]:
    """Return what the kernel takes beside int8 tokens; nothing beside others."""
    if scales is None:
        return {}
    return {"scales": scales.address, "fresh_scales": (scales if fresh is None else fresh).address}


def _table_faults(
    tables: DeviceEmbeddings, token_dtype: str, out_dtype: str, width: int
) -> Iterator[str]:
    """Yield one sentence for every table or dtype that no kernel takes."""
    yield from choice_faults("token_dtype", token_dtype, ("float16", "int8"))
    yield from choice_faults("out_dtype", out_dtype, ("float16", "bfloat16"))
    words, hidden = tables.words, tables.words.shape[-1]
    yield from array_faults("words", words, "float32", (words.shape[0], hidden))
    max_positions = tables.positions.shape[1] if len(tables.positions.shape) == 3 else 0
    yield from array_faults("positions", tables.positions, "float32", (2, max_positions, hidden))
    yield from array_faults("norm_weight", tables.norm_weight, "float32", (hidden,))
    yield from array_faults("norm_bias", tables.norm_bias, "float32", (hidden,))
    if hidden % 16 or not 16 <= hidden <= ASSEMBLE_COLUMNS[-1]:
        yield f"hidden: got {hidden}, expected a multiple of 16 up to {ASSEMBLE_COLUMNS[-1]}"
    if width % 16 or not hidden <= width <= ASSEMBLE_COLUMNS[-1]:
        most = ASSEMBLE_COLUMNS[-1]
        yield f"width: got {width}, expected a multiple of 16 from {hidden} to {most}"
