"""The page a backend author reads: the batch, the engine, the backend, who checks what.

A backend is one module with the functions of `Backend`, listed in `engines/registry.py`.
Its engine subclasses `Engine` (`HostEngine` on the CPU) and only works: the base class checks
every batch, `open_engine` checks every folder. What a backend cannot do it refuses with
`EngineError`; it never runs another precision or device than it was asked for.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from ..arguments import take_once
from ..arrays import Float32, even_parts
from ..bundle import INPUTS as INPUTS
from ..bundle import OUTPUT as OUTPUT
from ..bundle import BundleManifest
from ..errors import EngineError
from ..kernels.device.contract import Stream
from .batch import Batch as Batch
from .batch import memory_faults, shape_faults
from .batch import raise_faults as raise_faults
from .batch import value_faults as value_faults
from .manifest import EngineManifest, Profile, option_words

Progress = Callable[[str], None]


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
class BuildOptions:
    """How a backend builds. Those that a backend does not know it refuses, by name.

    Attributes:
        workspace_bytes: most device memory that a kernel may take while building; None is the
            library's choice.
        optimization_level: 0 (fast build) to 5 (fast engine); None is the library's choice.
        compute_capabilities: GPUs to build for, as `8.9`; none: every one the library knows.
        hardware_compatible: also run on other GPUs of the same or a later generation.
        version_compatible: also run with later versions of the library.
        report: keep the layers' names, kernels and precisions, and write them into the folder.
    """

    workspace_bytes: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    report: bool = False

    def __post_init__(self) -> None:
        take_once(self, "compute_capabilities")


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
    """

    graph: Path
    out: Path
    precision: str
    token_dtype: str
    profile: Profile
    bundle: BundleManifest
    options: BuildOptions
    progress: Progress


class Backend(Protocol):
    """The functions that a backend's module offers. Importing the module imports its library.

    One more is optional: `activation_scales(precision, sizes)` says in which ways 8-bit activations
    can be scaled for a model (`scales.Scales`); one static scale a tensor, as without it.
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
        )
        self._enqueue(batch, scores, stream)

    @property
    def bytes_a_stream(self) -> int:
        """Bytes of GPU memory that the first forward on a stream takes; 0 where nobody knows."""
        return 0

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
        for pairs in even_parts(len(batch), self._pairs_per_forward or len(batch)):
            self._infer(batch.part(pairs), scores[pairs])

    @abstractmethod
    def _infer(self, batch: Batch, scores: Float32) -> None:
        """Compute `scores` for `batch` on the calling thread, with the GIL released.

        Several threads may call it at once, each with arrays of its own.
        """


_CAPABILITY = re.compile(r"\d+\.\d")


def raise_option_faults(options: BuildOptions) -> None:
    """Refuse values that no backend can take.

    Raises:
        EngineError: with one sentence for each.
    """
    faults = []
    level, workspace = options.optimization_level, options.workspace_bytes
    if level is not None and not 0 <= level <= 5:
        faults.append(f"--optimization-level: got {level}, expected 0 (fast build) to 5")
    if workspace is not None and workspace < 1:
        faults.append(f"--workspace-mb: got {workspace >> 20}, expected 1 or more")
    faults += [
        f"--compute-capability: got {capability!r}, expected major and minor, as 8.9"
        for capability in options.compute_capabilities
        if not _CAPABILITY.fullmatch(capability)
    ]
    if faults:
        raise EngineError("no engine can be built with these options", faults=faults)


def given_options(options: BuildOptions) -> dict[str, Any]:
    """Return the fields that are not at their default, by name."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value != getattr(_NONE, name)}


def refused_options(backend: Backend, precision: str, options: BuildOptions) -> list[str]:
    """Return the options without which `backend` would build; none where it could not anyway."""
    if backend.why_not_build(precision, _NONE) is not None:
        return []
    return [
        flag(name, value)
        for name, value in given_options(options).items()
        if backend.why_not_build(precision, replace(_NONE, **{name: value})) is not None
    ]


def flag(name: str, value: Any) -> str:
    """Return how `edje build` spells the option `name`."""
    return option_words(name, value)[0]


_NONE = BuildOptions()
