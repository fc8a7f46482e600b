"""A TensorRT engine at work: contexts, profiles, memory, and forwards on a caller's stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np

from ...arrays import DeviceArray, Float32
from ...bundle import INPUTS, OUTPUT, VISUAL_SCALES
from ...errors import EngineError
from ...files import rewrite_file
from ...kernels.device import open_gpu
from ...kernels.device.contract import Device, Stream
from ...kernels.device.facts import current_index
from ..contract import Batch, Engine, OpenOptions, raise_faults
from ..manifest import EngineManifest
from .build import PLAN
from .library import TrtLibrary

_LEAST_BYTES = 1 << 20


class Scratch:
    """Memory of the current GPU, by stream. It grows, but never moves: graphs hold its addresses.

    Contexts of one stream run one after the other, so they may write into the same memory.
    """

    def __init__(self) -> None:
        self._device: Device | None = None  # opened for the first block
        self._blocks: dict[int, dict[int, int]] = {}  # stream -> bytes -> address

    def block(self, handle: int, num_bytes: int) -> tuple[int, int]:
        """Return address and size of at least `num_bytes` for contexts of the stream `handle`.

        Sizes are powers of two, so that what was outgrown is together smaller than the last.

        Raises:
            EngineError: the GPU's memory is full, or cuda.core is missing.
        """
        blocks = self._blocks.setdefault(handle, {})
        size = max(_LEAST_BYTES, 1 << max(num_bytes - 1, 0).bit_length())
        fitting = min((each for each in blocks if each >= size), default=None)
        if fitting is None:
            blocks[size] = self._allocate(size)
            fitting = size
        return blocks[fitting], fitting

    def _allocate(self, num_bytes: int) -> int:
        if self._device is None:
            self._device = open_gpu("cuda_core", current_index())
        with self._device.current():
            memory = self._device.memory(num_bytes, np.dtype(np.uint8)).view((num_bytes,))
        return cast(DeviceArray, memory).address

    def close(self) -> None:
        """Wait for the GPU and free all of it; no graph over it is launched any more.

        Calling it twice is allowed.
        """
        if self._device is not None:
            self._device.close()
        self._device = None
        self._blocks.clear()


RUNTIME_CACHE = "runtime_cache"
_GRAPHS, _KERNELS = "cuda_graph_strategy", "dynamic_shapes_kernel_specialization_strategy"
_CHOICES = {  # the library's enumeration, and the names of its members
    _GRAPHS: ("CudaGraphStrategy", ("disabled", "whole_graph_capture")),
    _KERNELS: ("DynamicShapesKernelSpecializationStrategy", ("lazy", "eager", "none")),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The backend's own settings at opening; TensorRT has none, TensorRT-RTX all.

    Attributes:
        choices: the runtime configuration's strategies, by their names in the library.
        runtime_cache: file of compiled kernels, read and renewed; None keeps none.
    """

    choices: Mapping[str, str]
    runtime_cache: Path | None


def read_settings(
    library: TrtLibrary, options: OpenOptions, runtime_cache: Path | None
) -> Settings:
    """Check the settings of an opening; `runtime_cache` is where kernels go by default.

    `backend_settings` of TensorRT-RTX: `cuda_graph_strategy` (disabled, whole_graph_capture),
    `dynamic_shapes_kernel_specialization_strategy` (lazy, eager, none), `runtime_cache` (a file,
    or `none`).

    Raises:
        EngineError: settings that the library does not have, or CPU threads (all named).
    """
    given = dict(options.backend_settings)
    known = (*_CHOICES, RUNTIME_CACHE) if library.is_rtx else ()
    faults = [f"{name}: unknown setting" for name in given if name not in known]
    faults += [
        f"{name}: got {given[name]!r}, expected {' or '.join(choices)}"
        for name, (_, choices) in _CHOICES.items()
        if name in known and name in given and given[name] not in choices
    ]
    if options.num_threads is not None:
        faults.append(f"num_threads: got {options.num_threads}, a GPU engine has no CPU threads")
    if faults:
        raise EngineError(f"{library.backend} cannot be opened so", faults=faults)
    if RUNTIME_CACHE in given:
        path = given.pop(RUNTIME_CACHE)
        runtime_cache = None if path == "none" else Path(path)
    return Settings(given, runtime_cache if library.is_rtx else None)


def open_plan(
    library: TrtLibrary, folder: Path, manifest: EngineManifest, settings: Settings
) -> TrtEngine:
    """Open the plan in `folder` on the current GPU.

    Raises:
        EngineError: the library says that the plan cannot run here, or cannot read it.
    """
    library.log.clear()
    plan = (folder / PLAN).read_bytes()
    runtime = library.module.Runtime(library.logger)
    if manifest.build_options.get("version_compatible"):
        runtime.engine_host_code_allowed = True  # such a plan carries its own lean runtime
    _check_validity(library, runtime, plan, folder)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{library.title} {library.version} cannot open {folder / PLAN}",
            faults=library.log.errors(),
            hint="build it on the GPU it shall run on",
        )
    return TrtEngine(library, manifest, runtime, engine, settings)


class TrtEngine(Engine):
    """Runs on the caller's stream; every stream has contexts of its own.

    Its contexts (one a text bucket) are made when it first uses the bucket, which allocates and
    may compile: warm every bucket up before measuring or capturing. Two threads may enqueue at
    once on two streams, never on one.

    A graph is undefined once its context has seen other shapes or addresses, so a captured
    forward has a context of its own; all of a stream's share their scratch memory, the large part.
    """

    on_device = True

    def __init__(
        self,
        library: TrtLibrary,
        manifest: EngineManifest,
        runtime: Any,
        engine: Any,
        settings: Settings,
    ):
        super().__init__(manifest)
        self._library = library
        self._runtime = runtime  # must outlive the engine
        self._engine = engine
        self._settings = settings
        self._contexts: dict[tuple[int, int], Any] = {}  # by stream and profile
        self._scratch = Scratch()
        self._lock = Lock()
        self._profiles = {t: index for index, t in enumerate(manifest.profile.text_buckets)}
        self._runtime_config, self._kernel_cache = self._configured()

    def _enqueue(self, batch: Batch, scores: Float32, stream: Stream) -> None:
        num_queries, bucket = batch.text_ids.shape
        most = self.manifest.profile.max_pairs
        if num_queries > most:
            raise_faults([f"queries: got {num_queries}, expected at most {most} (one a pair)"])
        context = self.context(stream, bucket)
        if not _bind_all(context, batch, scores):
            raise self._failed(batch)
        self._execute(context, batch, stream)

    def _execute(self, context: Any, batch: Batch, stream: Stream) -> None:
        if not context.execute_async_v3(stream.handle):
            raise self._failed(batch)

    def _failed(self, batch: Batch) -> EngineError:
        return EngineError(
            f"{self._library.title} failed on a batch of {len(batch)}",
            faults=self._library.log.errors(),
        )

    def context(self, stream: Stream, bucket: int) -> Any:
        """Return the stream's execution context for a text bucket, made at its first use.

        Raises:
            EngineError: the engine is closed, or the GPU's memory is full.
        """
        key = handle, profile = stream.handle, self._profiles[bucket]
        if key not in self._contexts:
            with self._lock:
                if key not in self._contexts:  # for their own profile only, not for the largest
                    made = self._make_context(handle, profile, "ON_PROFILE_CHANGE")
                    self._contexts[key] = made
        return self._contexts[key]

    @property
    def cuda_graph_strategy(self) -> str:
        """`whole_graph_capture` where the library captures CUDA graphs itself, else `disabled`."""
        return self._settings.choices.get(_GRAPHS, "disabled")

    def is_stream_capturable(self, stream: Stream, bucket: int) -> bool:
        """Return whether a forward on `stream` can be captured into a CUDA graph by the caller.

        TensorRT can always be captured once it is warm; TensorRT-RTX is asked (it cannot while it
        still compiles, or while it captures graphs itself).
        """
        context = self.context(stream, bucket)
        if not hasattr(context, "is_stream_capturable"):
            return True
        return bool(context.is_stream_capturable(stream.handle))

    def why_not_capture(self, stream: Stream, bucket: int) -> str | None:
        title = self._library.title
        if self.cuda_graph_strategy != "disabled":
            return f"{title} captures graphs itself: {_GRAPHS} is {self.cuda_graph_strategy}"
        if self._library.is_rtx and self._settings.choices.get(_KERNELS, "lazy") == "lazy":
            return (
                f"{title} may still replace its kernels, and a graph would keep the slow ones: "
                f"set {_KERNELS} to eager or none, or {_GRAPHS} to whole_graph_capture"
            )
        if not self.is_stream_capturable(stream, bucket):
            return f"{title} says that this engine cannot be captured"
        return None

    def capturable(self, batch: Batch, scores: Float32, stream: Stream) -> Callable[[Stream], None]:
        profile = self._profiles[batch.text_ids.shape[1]]
        with self._lock:
            context = self._make_context(stream.handle, profile, "USER_MANAGED")
            if not _bind_all(context, batch, scores):
                raise self._failed(batch)
            num_bytes = int(context.update_device_memory_size_for_shapes())
            context.set_device_memory(*self._scratch.block(stream.handle, num_bytes))
        return lambda on: self._execute(context, batch, on)

    def save_runtime_cache(self) -> bool:
        """Write the kernels compiled so far to the runtime cache; False where nothing was written.

        A folder that cannot be written is no fault: the next opening compiles again.
        """
        path, cache = self._settings.runtime_cache, self._kernel_cache
        if path is None or cache is None:
            return False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with rewrite_file(path) as file:
                file.write(bytes(cache.serialize()))
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._engine is None:
            return
        if self._contexts:
            self.save_runtime_cache()
        self._contexts.clear()  # contexts, then engine, then runtime
        self._scratch.close()
        self._runtime_config = self._kernel_cache = None
        self._engine = None
        self._runtime = None

    def _configured(self) -> tuple[Any, Any]:
        """Return TensorRT-RTX's runtime configuration and kernel cache; nothing for TensorRT."""
        if not self._library.is_rtx:
            return None, None
        config = self._engine.create_runtime_config()
        for name, choice in self._settings.choices.items():
            kind = getattr(self._library.module, _CHOICES[name][0])
            setattr(config, name, getattr(kind, choice.upper()))
        cache, path = config.create_runtime_cache(), self._settings.runtime_cache
        if path is not None and path.is_file():
            cache.deserialize(path.read_bytes())  # another driver's kernels are left aside
        config.set_runtime_cache(cache)
        return config, cache

    def _make_context(self, handle: int, profile: int, allocation: str) -> Any:
        """Make a context that gets its scratch memory as `allocation` says; the lock is held."""
        if self._engine is None:
            raise EngineError("the engine is closed")
        how = getattr(self._library.module.ExecutionContextAllocationStrategy, allocation)
        config = self._runtime_config
        if config is not None:
            config.set_execution_context_allocation_strategy(how)
        context = self._engine.create_execution_context(how if config is None else config)
        if context is None or not context.set_optimization_profile_async(profile, handle):
            raise EngineError(
                f"{self._library.title} cannot make another context",
                faults=self._library.log.errors(),
                hint="use fewer streams, text buckets or --max-pairs",
            )
        return context


def _bind_all(context: Any, batch: Batch, scores: Any) -> bool:
    """Set shapes and addresses; return whether the context takes them."""
    given = {name: getattr(batch, name) for name in (*INPUTS, VISUAL_SCALES)}
    return context.set_tensor_address(OUTPUT, scores.address) and all(
        context.set_input_shape(name, array.shape)
        and context.set_tensor_address(name, array.address)
        for name, array in given.items()
        if array is not None
    )


def _check_validity(library: TrtLibrary, runtime: Any, plan: bytes, folder: Path) -> None:
    """Ask TensorRT-RTX whether the plan can run on this GPU, before reading all of it."""
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, diagnostics = runtime.get_engine_validity(plan)
    if validity != library.module.EngineValidity.INVALID:
        return
    kinds = library.module.EngineInvalidityDiagnostics.__members__
    reasons = [name for name, bit in kinds.items() if int(diagnostics) & int(bit)]
    raise EngineError(
        f"{library.title} {library.version} says that {folder / PLAN} cannot run here: "
        f"{', '.join(reasons) or 'it gives no reason'}",
        hint="build it again with --compute-capability of this GPU, or another --precision",
    )
