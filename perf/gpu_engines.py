"""Two rivals behind the engine contract, so that they are measured bare and in our pipeline alike.

They are for measuring: queries must fill their text bucket, and the first batch of every shape
compiles or captures.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..arrays import DeviceArray, Float32
from ..bundle import JOINT_ENCODER, BundleManifest
from ..engines.builder.cache import cached_engine
from ..engines.builder.options import EngineOptions
from ..engines.contract import INPUTS, OUTPUT, Batch, Engine
from ..engines.manifest import EngineManifest, Profile
from ..engines.precision.prepare import DEFAULT_LIMITS, Recipe, prepare_graph
from ..engines.registry import open_engine, require_backend
from ..engines.samples import RandomSamples
from ..errors import EngineError
from ..kernels.device.contract import Stream
from ..kernels.device.facts import current_gpu
from ..kernels.device.measuring import GpuArrays, gpu_arrays
from .random_model import CACHE, source_hash

CUDA_PROVIDER = "CUDAExecutionProvider"
WAITING_RUNS = 64  # what the others leave in pinned memory is a few kB a run


class TorchEngine(Engine):
    """The lean scorer, compiled, in float16; one CUDA graph a stream, shape and set of addresses.

    One thread at a time: its graphs share their memory.
    """

    on_device = True

    def __init__(self, bundle: Path, profile: Profile):
        """Read the weights; compiling comes with the first batch of a shape."""
        from .scorers import load_scorer

        torch: Any = import_module("torch")
        super().__init__(manifest_of(bundle, "PyTorch", torch.__version__, "fp16", profile))
        self._torch = torch
        self._scorer = load_scorer(bundle, device="cuda", dtype="float16", compiled=True)
        self._graphs: dict[tuple[Any, ...], Any] = {}
        self._memory = torch.cuda.graph_pool_handle()
        self._capturing = torch.cuda.Stream()  # one: cuBLAS keeps a workspace for each

    def _enqueue(self, batch: Batch, scores: Float32, stream: Stream) -> None:
        torch = self._torch
        arrays = [getattr(batch, name) for name in INPUTS]
        key = stream.handle, *((array.address, array.shape) for array in (*arrays, scores))
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.ExternalStream(stream.handle)):
            graph = self._graphs.get(key)
            if graph is None:
                self._graphs[key] = self._captured(batch, scores)
            else:
                graph.replay()

    def _captured(self, batch: Batch, scores: Any) -> Any:
        """Run once in the current stream, which compiles; then capture the same work."""
        torch = self._torch
        ids, asks = _tensor(torch, batch.text_ids), _tensor(torch, batch.query_of_pair)
        tokens, out = _tensor(torch, batch.visual_tokens), _tensor(torch, scores)

        def run() -> None:
            out.copy_(self._scorer(ids, asks, tokens))

        run()
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=self._memory,
            stream=self._capturing,
            capture_error_mode="thread_local",  # the pipeline's other streams go on copying
        ):
            run()
        return graph

    def close(self) -> None:
        self._graphs.clear()


class OrtCudaEngine(Engine):
    """ONNX Runtime's CUDA provider on the caller's stream; a session a stream.

    A run that does not wait for the GPU leaves its pinned host buffers with the session until a
    run that waits. A session that is freed while it has some hands them to a callback in the
    stream, together with the last hold on their allocator: it ends in the callback, where CUDA
    permits no call (cudaFreeHost: error 800), and the process with SIGABRT (1.31.1). So every
    WAITING_RUNS-th run waits, and one more before the end.
    """

    on_device = True

    def __init__(self, bundle: Path, precision: str, profile: Profile):
        """Prepare the graph.

        Raises:
            EngineError: this onnxruntime has no CUDA provider.
        """
        import onnxruntime

        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA and cuDNN of the Python packages, where they are
        if CUDA_PROVIDER not in onnxruntime.get_available_providers():
            raise EngineError(
                f"onnxruntime {onnxruntime.__version__} here has no {CUDA_PROVIDER}",
                hint="pip install onnxruntime-gpu instead of onnxruntime",
            )
        manifest = manifest_of(bundle, "ONNX Runtime", onnxruntime.__version__, precision, profile)
        super().__init__(manifest)
        self._ort = onnxruntime
        self._graph = _typed_graph(bundle, precision, profile)
        self._sessions: dict[int, Any] = {}
        self._waiting, self._running_on = onnxruntime.RunOptions(), onnxruntime.RunOptions()
        self._running_on.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._num_runs = 0

    def _enqueue(self, batch: Batch, scores: Float32, stream: Stream) -> None:
        session = self._sessions.get(stream.handle)
        if session is None:
            session = self._sessions[stream.handle] = self._open(stream.handle)
        self._num_runs += 1
        waits = self._num_runs % WAITING_RUNS == 0
        self._run(session, batch, scores, self._waiting if waits else self._running_on)

    def _run(self, session: Any, batch: Batch, scores: Any, options: Any) -> None:
        binding = session.io_binding()
        for name in INPUTS:
            _bind(binding.bind_input, name, getattr(batch, name))
        _bind(binding.bind_output, OUTPUT, scores)
        session.run_with_iobinding(binding, options)

    def _open(self, handle: int) -> Any:
        options = {"device_id": "0", "user_compute_stream": str(handle)}
        session = self._ort.InferenceSession(self._graph, providers=[(CUDA_PROVIDER, options)])
        if session.get_providers()[0] != CUDA_PROVIDER:
            raise EngineError(f"onnxruntime runs on {session.get_providers()[0]}, not on the GPU")
        return session

    def why_not_capture(self, stream: Stream, bucket: int) -> str | None:
        return "ONNX Runtime frees host buffers by a callback in the stream, which a graph repeats"

    def close(self) -> None:
        """Let every session free its buffers in a run that waits, then free the sessions."""
        if self._sessions:
            with gpu_arrays() as gpu:  # its end waits for the GPU, callbacks included
                batch, scores = self._one_pair(gpu)
                for session in self._sessions.values():
                    self._run(session, batch, scores, self._waiting)
        self._sessions.clear()

    def _one_pair(self, gpu: GpuArrays) -> tuple[Batch, DeviceArray]:
        """Return a batch of one pair on the GPU, and where its score goes."""
        sizes, bucket = self.manifest.bundle.sizes, min(self.manifest.profile.text_buckets)
        host = Batch(
            np.zeros((1, bucket), np.int32),
            np.full(1, bucket, np.int32),
            np.zeros(1, np.int32),
            np.zeros((1, sizes.num_tokens, sizes.hidden), np.float16),
        )
        arrays: dict[str, Any] = {name: gpu.upload(getattr(host, name)) for name in INPUTS}
        return Batch(**arrays), gpu.result((1,), "float32")


def built_engine(
    bundle: Path, backend: str, precision: str, profile: Profile, tell: Callable[[str], None]
) -> Engine:
    """Open an engine of one of our GPU backends, built once for every state of the sources.

    Raises:
        EngineError: its library is missing, or this GPU cannot build or run it.
    """
    require_backend(backend, precision)  # before a build that this GPU could not run
    folder = cached_engine(
        bundle,
        CACHE / f"engines-{source_hash('engines')}",
        backend=backend,
        precision=precision,
        calibration=RandomSamples(BundleManifest.read(bundle)),
        options=EngineOptions(max_pairs=profile.max_pairs, text_buckets=profile.text_buckets),
        progress=tell,
    )
    return open_engine(folder)


def manifest_of(
    bundle: Path, library: str, version: str, precision: str, profile: Profile
) -> EngineManifest:
    """Return the manifest of an engine that no backend built."""
    return EngineManifest(
        backend=library,
        backend_version=version,
        precision=precision,
        device={"kind": "cuda", "name": current_gpu().name},
        profile=profile,
        bundle=BundleManifest.read(bundle),
        bundle_path=str(bundle),
        onnx_sha256="",
        precision_plan={},
        token_dtype="float16",
        files={},
        build_options={},
        build_seconds=0.0,
        fidelity={},
    )


def _typed_graph(bundle: Path, precision: str, profile: Profile) -> bytes:
    """Return the joint encoder's graph in `precision`."""
    source = bundle / JOINT_ENCODER
    if precision == "fp32":
        return source.read_bytes()
    recipe = Recipe(precision, "float16", "float16", None, DEFAULT_LIMITS)
    with TemporaryDirectory() as scratch:
        graph = Path(scratch) / JOINT_ENCODER
        prepare_graph(source, graph, recipe, BundleManifest.read(bundle), profile)
        return graph.read_bytes()


def _bind(bind: Callable[..., None], name: str, array: Any) -> None:
    bind(name, "cuda", 0, array.dtype.type, list(array.shape), array.address)


class _Exposed:
    """Memory as PyTorch takes it; whoever allocated it keeps it."""

    def __init__(self, array: DeviceArray):
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": np.dtype(array.dtype).str,
            "data": (array.address, False),
            "version": 3,
        }


def _tensor(torch: Any, array: Any) -> Any:
    return torch.as_tensor(_Exposed(array), device="cuda")
