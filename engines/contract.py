"""The page a backend author reads: the batch, the engine, the backend, who checks what.

A backend is one module with the functions of `Backend`, listed in `engines/registry.py`.
Its engine subclasses `Engine` (`HostEngine` on the CPU) and only works: the base class checks
every batch, `open_engine` checks every folder. What a backend cannot do it refuses with
`EngineError`; it never runs another precision or device than it was asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..arrays import Array, DeviceArray, Float16, Float32, Int32, even_parts
from ..bundle import INPUTS, OUTPUT, VISUAL_SCALES, BundleManifest
from ..errors import EngineError
from ..kernels.device.contract import Stream
from .build_options import BuildOptions
from .manifest import EngineManifest, Profile

Progress = Callable[[str], None]
BESIDE_8_BITS = "beside_8_bits"  # in a manifest's `build_options`: the narrower type


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
        hidden: only for an engine with a `hidden_shape` (S, W): states float16 [N, S, W] (two bytes
            each, whatever they mean) and places int32 [P]. A shallow engine leaves the hidden
            states of pair p at its place, at -1 nowhere; a whole one goes on from what lies there,
            and reads no tokens.
    """

    text_ids: Int32
    text_length: Int32
    query_of_pair: Int32
    visual_tokens: Array
    visual_scales: Float16 | None = None
    rows: Int32 | None = None
    fresh: tuple[Array, Float16 | None] | None = None
    hidden: tuple[Array, Int32] | None = None

    def __len__(self) -> int:
        return int(self.query_of_pair.shape[0])

    def part(self, pairs: slice) -> Batch:
        """Return some of the pairs, with all queries; views, no copy."""
        scales, by_row = self.visual_scales, self.rows is not None
        return replace(
            self,
            query_of_pair=self.query_of_pair[pairs],
            visual_tokens=self.visual_tokens if by_row else self.visual_tokens[pairs],
            visual_scales=scales if by_row or scales is None else scales[pairs],
            rows=None if self.rows is None else self.rows[pairs],
            hidden=None if self.hidden is None else (self.hidden[0], self.hidden[1][pairs]),
        )


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How to open an engine.

    Attributes:
        num_threads: CPU threads of one forward; None is the backend's choice (all cores).
        backend_settings: the backend's own settings, by the backend's own names.
    """

    num_threads: int | None = None
    backend_settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BuildJob:
    """What a backend builds from.

    Attributes:
        graph: strongly typed ONNX: the bundle's joint encoder in the job's precision.
        out: folder for the backend's own files.
        precision: one of `PRECISIONS`.
        token_dtype: dtype of the graph's `visual_tokens`: `float16`, or `int8` with scales.
        profile, bundle: what the engine must accept, and the model it was made from.
        progress: called with one short line before each step.
        strict: everything that is not quantised runs in the compute type. Otherwise a backend may
            run it in a narrower one and say so in the flag `BESIDE_8_BITS`.
    """

    graph: Path
    out: Path
    precision: str
    token_dtype: str
    profile: Profile
    bundle: BundleManifest
    options: BuildOptions
    progress: Progress
    strict: bool = False


class Backend(Protocol):
    """The functions that a backend's module offers. Importing the module imports its library.

    Two more things are optional. `activation_scales(precision, sizes)` says in which ways 8-bit
    activations can be scaled for a model (`scales.Scales`); one static scale a tensor, as without
    it. `OPERANDS_ONLY`, if true, says that 16-bit types are for the operands of products only.
    """

    def version(self) -> str:
        """Return the library's version; an engine opens only with the one that built it."""
        ...

    def why_not(self, precision: str) -> str | None:
        """Return why this machine cannot run `precision`, None where it can."""
        ...

    def why_not_build(self, precision: str, options: BuildOptions) -> str | None:
        """Return why this machine cannot build `precision` with `options`, None where it can."""
        ...

    def compute_type(self, precision: str) -> str:
        """Return the type that the graph shall give everything that is not quantised.

        `float32`, `float16` or `bfloat16`. A backend that lowers float32 by itself (OpenVINO's
        bf16) says `float32`.
        """
        ...

    def build(self, job: BuildJob) -> Mapping[str, Any]:
        """Write the backend's files into `job.out`; return the build flags worth recording."""
        ...

    def device(self, precision: str, options: BuildOptions) -> dict[str, Any]:
        """Return the manifest's `device` entry for an engine built now."""
        ...

    def device_faults(self, manifest: EngineManifest) -> list[str]:
        """Return one sentence for everything this machine lacks that the engine was built for."""
        ...

    def load(self, folder: Path, manifest: EngineManifest, options: OpenOptions) -> Engine:
        """Open what `build` wrote. The folder was checked against the manifest."""
        ...


class Engine(ABC):
    """A joint encoder ready to run. Subclasses implement `_enqueue` and `close`.

    Attributes:
        on_device: whether it takes `DeviceArray`s; host arrays otherwise.
        reads_rows: whether it finds a batch's tokens by row among a pool's (`Batch.rows`).
    """

    on_device = False
    reads_rows = False

    def __init__(self, manifest: EngineManifest):
        self.manifest = manifest

    def enqueue(self, batch: Batch, scores: Float32, *, stream: Stream) -> None:
        """Run one forward in the order of `stream`; `scores` float32 [P] gets the raw logits.

        Returns at once. `batch` and `scores` belong to the caller and must live, unchanged,
        until the stream has passed this work.

        Raises:
            EngineError: shapes, dtypes or sizes outside the engine's profile (all at once).
        """
        raise_faults(
            memory_faults(batch, scores, self.on_device)
            or shape_faults(batch, scores, self.manifest, reads_rows=self.reads_rows)
            or hidden_faults(batch, self.hidden_shape(batch.text_ids.shape[1]))
        )
        self._enqueue(batch, scores, stream)

    @property
    def bytes_a_stream(self) -> int:
        """Bytes of GPU memory that the first forward on a stream takes; 0 where nobody knows."""
        return 0

    def hidden_shape(self, bucket: int) -> tuple[int, int] | None:
        """Return slots and values of a pair's hidden states (`Batch.hidden`); None: takes none."""
        return None

    def why_not_resume(self, first: Engine) -> str | None:
        """Get ready to go on from hidden states that `first` keeps; return why not, None: it will.

        Its scores are then, bit by bit, those of a whole forward. Asked before any forward.
        """
        return f"{self.manifest.words} starts every pair again"

    def why_not_capture(self, stream: Stream, bucket: int) -> str | None:
        """Return why forwards cannot be captured into a CUDA graph, None where they can.

        Asked once a forward of `bucket` was enqueued on `stream`. An engine that says None also
        thinks of `capturable`.
        """
        return f"{self.manifest.backend} has no forward that can be captured"

    def capturable(self, batch: Batch, scores: Float32, stream: Stream) -> Callable[[Stream], None]:
        """Return a forward of these very arrays, to be enqueued once and then captured.

        What it returns enqueues that forward on the stream it is given, which has the handle of
        `stream`: first as any other, which makes it warm, then once more while that stream is
        captured, with nothing on the stream in between. Whoever launches the graph keeps the
        arrays and what was returned as long as the graph, and launches on `stream` only.

        An engine whose enqueued work uses state that later forwards change gives it a state of
        its own here.

        Args:
            batch, scores: accepted by `enqueue` before; they stay the caller's.

        Raises:
            EngineError: there is no room for one more.
        """
        return lambda on: self.enqueue(batch, scores, stream=on)

    @abstractmethod
    def _enqueue(self, batch: Batch, scores: Float32, stream: Stream) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Free what the engine holds, while its streams are there. Calling it twice is allowed."""


class HostEngine(Engine):
    """A CPU engine: a blocking `_infer` that the stream's worker calls.

    The worker also checks the values (they may be written by earlier work of the stream):
    OpenVINO reads zeros, or worse, for an index that is out of range. And it cuts a batch into
    forwards of about `pairs_per_forward` (None: never), so that activations stay in the caches.
    """

    def __init__(self, manifest: EngineManifest, *, pairs_per_forward: int | None = None):
        super().__init__(manifest)
        self._pairs_per_forward = pairs_per_forward

    def _enqueue(self, batch: Batch, scores: Float32, stream: Stream) -> None:
        stream.submit(lambda: self._run(batch, scores))

    def _run(self, batch: Batch, scores: Float32) -> None:
        raise_faults(value_faults(batch, self.manifest))
        parts = list(even_parts(len(batch), self._pairs_per_forward or len(batch)))
        for pairs in parts:
            self._infer(batch.part(pairs) if len(parts) > 1 else batch, scores[pairs])

    @abstractmethod
    def _infer(self, batch: Batch, scores: Float32) -> None:
        """Compute `scores` for `batch` on the calling thread, with the GIL released.

        Several threads may call it at once, each with arrays of its own.
        """


def raise_faults(faults: list[str]) -> None:
    """Raise one EngineError that lists `faults`; return when there are none."""
    if faults:
        raise EngineError("this batch does not fit the engine", faults=faults)


def memory_faults(batch: Batch, scores: Float32, on_device: bool) -> list[str]:
    """Return one sentence where arrays lie elsewhere than the engine runs."""
    text = batch.text_ids, batch.text_length, batch.query_of_pair
    rest = batch.visual_tokens, batch.visual_scales, batch.rows, batch.fresh, batch.hidden
    if not on_device and {*map(type, (*text, *rest, scores))} <= {np.ndarray, type(None)}:
        return []
    arrays = {name: getattr(batch, name) for name in (*INPUTS, VISUAL_SCALES, "rows")}
    arrays |= dict(zip(("fresh", "fresh scales"), batch.fresh or (), strict=False))
    arrays |= dict(zip(("hidden", "places"), batch.hidden or (), strict=False))
    wrong = [
        name
        for name, array in {**arrays, OUTPUT: scores}.items()
        if array is not None and isinstance(array, DeviceArray) != on_device
    ]
    host, gpu = "host memory", "GPU memory (DeviceArray)"
    here, there = (gpu, host) if on_device else (host, gpu)
    return [f"{', '.join(wrong)}: in {there}, this engine takes {here}"] if wrong else []


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


def hidden_faults(batch: Batch, shape: tuple[int, int] | None) -> list[str]:
    """Return one sentence for every array of `Batch.hidden` that is not of this `hidden_shape`."""
    if batch.hidden is None:
        return []
    if shape is None:
        return ["hidden: this engine neither keeps hidden states nor goes on from some"]
    states, places = batch.hidden
    return [
        *_array_faults("hidden", states, "float16", (*states.shape[:1], *shape)),
        *_array_faults("places", places, "int32", (len(batch),)),
    ]


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
        if _is_outside(array, low, high)
    ]


def _is_outside(array: Int32, low: int, high: int) -> bool:
    """Whether a value lies outside; from 0 on one look does, as negative ones are large without."""
    if low == 0:
        return bool(array.view(np.uint32).max() > high)
    return bool(array.min() < low or array.max() > high)


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
