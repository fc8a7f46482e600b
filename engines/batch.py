"""A batch: P pairs over Q queries, as engines take it, and what can be wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..arrays import Array, DeviceArray, Float16, Float32, Int32
from ..bundle import INPUTS, OUTPUT, VISUAL_SCALES
from ..errors import EngineError
from .manifest import EngineManifest


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward: P pairs over Q queries.

    Arrays live where the engine runs (host memory for CPU engines, `DeviceArray`s for engines on
    a GPU), are C-contiguous, belong to the caller and must stay untouched until the stream has
    passed the engine's work. A GPU engine cannot look at the values: the caller vouches for them.
    `fidelity.score_host_batch(engine, batch)` scores a host batch on a GPU, for measuring.

    Attributes:
        text_ids: int32 [Q, T]: `[CLS] wordpieces [SEP]`, right-padded with 0; T is a bucket.
        text_length: int32 [Q]: real ids of each query, CLS and SEP included.
        query_of_pair: int32 [P]: which query each pair asks.
        visual_tokens: float16 [P, m, H] (int8 where the engine says so).
        visual_scales: float16 [P, m], only with int8 tokens.
        rows: int32 [P], only for an engine that `reads_rows`: pair p has record `rows[p]` of
            `visual_tokens` [R, m, H] and `visual_scales` [R, m], and R + f is record f of `fresh`.
        fresh: with rows, more tokens [F, m, H] and their scales [F, m].
    """

    text_ids: Int32
    text_length: Int32
    query_of_pair: Int32
    visual_tokens: Array
    visual_scales: Float16 | None = None
    rows: Int32 | None = None
    fresh: tuple[Array, Float16 | None] | None = None

    def __len__(self) -> int:
        return int(self.query_of_pair.shape[0])

    def part(self, pairs: slice) -> Batch:
        """Return some of the pairs, with all queries; views, no copy."""
        if self.rows is not None:
            some = self.query_of_pair[pairs]
            return replace(self, query_of_pair=some, rows=self.rows[pairs])
        scales = self.visual_scales
        return replace(
            self,
            query_of_pair=self.query_of_pair[pairs],
            visual_tokens=self.visual_tokens[pairs],
            visual_scales=None if scales is None else scales[pairs],
        )


def raise_faults(faults: list[str]) -> None:
    """Raise one EngineError that lists `faults`; return when there are none."""
    if faults:
        raise EngineError("this batch does not fit the engine", faults=faults)


def memory_faults(batch: Batch, scores: Float32, on_device: bool) -> list[str]:
    """Return one sentence where arrays lie elsewhere than the engine runs."""
    arrays = {name: getattr(batch, name) for name in (*INPUTS, VISUAL_SCALES, "rows")}
    arrays |= dict(zip(("fresh", "fresh scales"), batch.fresh or (), strict=False))
    wrong = [
        name
        for name, array in {**arrays, OUTPUT: scores}.items()
        if array is not None and isinstance(array, DeviceArray) != on_device
    ]
    if not wrong:
        return []
    here, there = "host memory", "GPU memory (DeviceArray)"
    if on_device:
        here, there = there, here
    return [f"{', '.join(wrong)}: in {there}, this engine takes {here}"]


def shape_faults(
    batch: Batch, scores: Float32, manifest: EngineManifest, *, reads_rows: bool = False
) -> list[str]:
    """Return one sentence for every dtype, shape or size that does not fit the profile."""
    sizes, profile = manifest.bundle.sizes, manifest.profile
    if batch.text_ids.ndim != 2 or batch.query_of_pair.ndim != 1:
        return [
            f"text_ids and query_of_pair: got {list(batch.text_ids.shape)} and "
            f"{list(batch.query_of_pair.shape)}, expected [Q, T] and [P]"
        ]
    num_pairs, (num_queries, bucket) = len(batch), batch.text_ids.shape
    num_records = num_pairs if batch.rows is None else batch.visual_tokens.shape[0]
    token_shape = (num_records, sizes.num_tokens, sizes.hidden)
    faults = [
        *_array_faults("text_ids", batch.text_ids, "int32", (num_queries, bucket)),
        *_array_faults("text_length", batch.text_length, "int32", (num_queries,)),
        *_array_faults("query_of_pair", batch.query_of_pair, "int32", (num_pairs,)),
        *_array_faults("visual_tokens", batch.visual_tokens, manifest.token_dtype, token_shape),
        *_scale_faults(batch, manifest.token_dtype),
        *_row_faults(batch, token_shape[1:], manifest.token_dtype, reads_rows),
        *_array_faults(OUTPUT, scores, "float32", (num_pairs,)),
    ]
    if not (isinstance(scores, DeviceArray) or scores.flags.writeable):
        faults.append(f"{OUTPUT}: got a read-only array")
    if not 1 <= num_pairs <= profile.max_pairs:
        faults.append(f"pairs: got {num_pairs}, expected 1 to {profile.max_pairs}")
    if num_queries < 1:
        faults.append("queries: got 0, expected at least 1")
    if bucket not in profile.text_buckets:
        faults.append(f"text slots: got {bucket}, expected one of {list(profile.text_buckets)}")
    return faults


def value_faults(batch: Batch, manifest: EngineManifest) -> list[str]:
    """Return one sentence for every index outside its table. Reads the arrays: host only."""
    num_queries, bucket = batch.text_ids.shape
    ranges = (
        ("text_ids", batch.text_ids, 0, manifest.bundle.sizes.vocab_size - 1),
        ("text_length", batch.text_length, 2, min(bucket, manifest.bundle.text.max_wordpieces + 2)),
        ("query_of_pair", batch.query_of_pair, 0, num_queries - 1),
    )
    return [
        f"{name}: got values from {array.min()} to {array.max()}, expected {low} to {high}"
        for name, array, low, high in ranges
        if array.min() < low or array.max() > high
    ]


def _array_faults(name: str, array: Array, dtype: str, shape: tuple[int, ...]) -> list[str]:
    contiguous = isinstance(array, DeviceArray) or array.flags.c_contiguous
    if array.dtype == dtype and array.shape == shape and contiguous:
        return []
    layout = "" if contiguous else ", not C-contiguous"
    return [
        f"{name}: got {array.dtype} {list(array.shape)}{layout}, expected {dtype} {list(shape)}"
    ]


def _scale_faults(batch: Batch, token_dtype: str) -> list[str]:
    scales = batch.visual_scales
    if token_dtype != "int8":
        return [] if scales is None else [f"visual_scales: got an array, {token_dtype} has none"]
    if scales is None:
        return ["visual_scales: got none, int8 tokens need float16 [P, m]"]
    return _array_faults("visual_scales", scales, "float16", batch.visual_tokens.shape[:2])


def _row_faults(
    batch: Batch, record: tuple[int, int], token_dtype: str, reads_rows: bool
) -> list[str]:
    if batch.rows is None:
        return []
    if not reads_rows:
        return ["rows: this engine reads the tokens of every pair in their order"]
    faults = _array_faults("rows", batch.rows, "int32", (len(batch),))
    if batch.fresh is None:
        return faults
    tokens, scales = batch.fresh
    faults += _array_faults("fresh", tokens, token_dtype, (tokens.shape[0], *record))
    if scales is not None:
        faults += _array_faults("fresh scales", scales, "float16", tokens.shape[:2])
    return faults
