"""torch.compile behind the engine contract, measured bare and in our pipeline like our backends.

It is for measuring: queries must fill their text bucket, and the first batch of every shape
compiles and captures.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import DeviceArray, Float32
from ..bundle import INPUTS, BundleManifest
from ..engines.builder.cache import cached_engine
from ..engines.builder.options import EngineOptions
from ..engines.contract import Batch, Engine
from ..engines.manifest import EngineManifest, Profile
from ..engines.registry import open_engine, require_backend
from ..engines.samples import RandomSamples
from ..kernels.device.contract import Stream
from ..kernels.device.facts import current_gpu
from .random_model import CACHE, source_hash


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
        layers=BundleManifest.read(bundle).sizes.num_layers,
        token_dtype="float16",
        files={},
        build_options={},
        build_seconds=0.0,
        fidelity={},
    )


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
