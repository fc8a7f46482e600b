"""ONNX Runtime's CUDA provider at work: a session a stream, arrays bound as they lie, no CPU.

A run that does not wait for the GPU leaves its pinned host buffers with the session until a run
that waits. A session that is freed while it has some hands them to a callback in the stream,
together with the last hold on their allocator: it ends in the callback, where CUDA permits no call
(cudaFreeHost: error 800), and the process with SIGABRT (onnxruntime-gpu 1.31.1 on an H200). So
every WAITING_RUNS-th run of a session waits, and one more before its end.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime as ort

from ..arrays import DeviceArray, Float32
from ..bundle import INPUTS, OUTPUT, TEXT_SLOTS, VISUAL_SCALES, node_name
from ..errors import EngineError
from ..kernels.device.contract import Stream
from ..kernels.device.measuring import GpuArrays, gpu_arrays
from .contract import Batch, Engine
from .manifest import EngineManifest

PROVIDER = "CUDAExecutionProvider"
WAITING_RUNS = 64  # what the others leave in pinned memory is a few kB a run
MOST_NAMED = 5
# ONNX Runtime itself puts arithmetic on shapes there: two scalar operations of our graph. So its
# `session.disable_cpu_ep_fallback`, which permits no node at all, cannot be used.
ON_CPU = node_name(TEXT_SLOTS, "")
_ERRORS_ONLY = 3  # ORT's severity scale; its warnings at open are not for our users


class OrtCudaEngine(Engine):
    """Runs on the caller's stream; every stream has a session of its own, with its own weights.

    A session is made when it first sees a stream: warm every stream up before measuring. Two
    threads may enqueue at once on two streams, never on one. Its end enqueues once more on each,
    and comes with the process where nobody closed it.
    """

    on_device = True

    def __init__(
        self, manifest: EngineManifest, model: Path, settings: Mapping[str, str], gpu: int
    ):
        """Keep what sessions are made of.

        Args:
            settings: of the CUDA provider, by its own names.
            gpu: number of the GPU that the streams belong to.
        """
        super().__init__(manifest)
        self._sessions = _Sessions(manifest, model, settings, gpu)
        self._end = weakref.finalize(self, self._sessions.close)

    def _enqueue(self, batch: Batch, scores: Float32, stream: Stream) -> None:
        self._sessions.on(stream).run(batch, scores)

    def why_not_capture(self, stream: Stream, bucket: int) -> str | None:
        return "ONNX Runtime frees host buffers by a callback in the stream, which a graph repeats"

    def close(self) -> None:
        self._end()


class _Session:
    """One session of ONNX Runtime, bound to one stream."""

    def __init__(self, session: Any, stream: Stream, gpu: int):
        self._session, self._gpu = session, gpu
        self._stream = stream  # kept: the session has nothing but its handle
        self._num_runs = 0
        self._waiting, self._running_on = ort.RunOptions(), ort.RunOptions()
        self._running_on.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self, batch: Batch, scores: Any, *, waits: bool = False) -> None:
        """Enqueue one forward, and wait for it where `waits` or the turn says so."""
        self._num_runs += 1
        waits = waits or self._num_runs % WAITING_RUNS == 0
        binding = self._session.io_binding()
        for name in (*INPUTS, VISUAL_SCALES):
            self._bind(binding.bind_input, name, getattr(batch, name))
        self._bind(binding.bind_output, OUTPUT, scores)
        options = self._waiting if waits else self._running_on
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # ORT's exception classes share no base of their own
            raise EngineError(f"ONNX Runtime failed on a batch of {len(batch)}: {error}") from error

    def _bind(self, bind: Callable[..., None], name: str, array: Any) -> None:
        if array is not None:
            bind(name, "cuda", self._gpu, array.dtype.type, list(array.shape), array.address)


class _Sessions:
    """The sessions of one engine, by stream; they end only after a run that waited."""

    def __init__(
        self, manifest: EngineManifest, model: Path, settings: Mapping[str, str], gpu: int
    ):
        self._manifest, self._model = manifest, model
        self._settings, self._gpu = settings, gpu
        self._process = os.getpid()
        self._lock = Lock()
        self._by_stream: dict[int, _Session] = {}
        self._closed = False

    def on(self, stream: Stream) -> _Session:
        """Return the session of a stream, opened at its first use.

        Raises:
            EngineError: the engine is closed, or ONNX Runtime cannot open the graph on the GPU,
                all of it.
        """
        session = self._by_stream.get(stream.handle)
        if session is not None:
            return session
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed")
            if stream.handle not in self._by_stream:
                opened = open_session(self._model, self._settings, self._gpu, stream.handle)
                self._by_stream[stream.handle] = _Session(opened, stream, self._gpu)
            return self._by_stream[stream.handle]

    def close(self) -> None:
        """Let every session free its buffers in a run that waits, then free the sessions."""
        if os.getpid() != self._process:
            return  # a forked child: the sessions are the parent's
        with self._lock:
            self._closed = True
        # A lost GPU has nothing left to wait for.
        with suppress(Exception), gpu_arrays() as gpu:  # its end waits for callbacks as well
            if self._by_stream:
                batch, scores = _one_pair(self._manifest, gpu)
            for session in self._by_stream.values():
                session.run(batch, scores, waits=True)
        self._by_stream.clear()


def open_session(model: Path, settings: Mapping[str, str], gpu: int, handle: int) -> Any:
    """Return a session that runs on the stream `handle` of a GPU, and nowhere else.

    float32 products are float32: TF32, which rounds to 10 bits, is off.

    Raises:
        EngineError: the default stream, which ONNX Runtime takes for none; no session can be
            opened; or it would run on the CPU, wholly or in part (the nodes are named).
    """
    if not handle:
        raise EngineError(
            "ONNX Runtime cannot run on CUDA's default stream",
            hint="pass a stream that was made, or none",
        )
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    where = {"device_id": str(gpu), "user_compute_stream": str(handle), "use_tf32": "0"}
    providers = [(PROVIDER, {**where, **settings})]
    try:
        session = ort.InferenceSession(str(model), options, providers=providers, enable_fallback=0)
    except Exception as error:  # ORT's exception classes share no base of their own
        raise EngineError(f"ONNX Runtime cannot open {model} on the GPU: {error}") from error
    ran_by = session.get_providers()[0]
    if ran_by != PROVIDER:
        raise EngineError(
            f"ONNX Runtime could not start {PROVIDER} and would run on {ran_by}",
            hint="it wrote why on standard error; `edje doctor` names missing libraries",
        )
    left = nodes_elsewhere(session)
    if left:
        raise EngineError(
            f"ONNX Runtime {ort.__version__} leaves {len(left)} nodes to the CPU",
            faults=left[:MOST_NAMED],
            hint="build another --precision",
        )
    return session


def nodes_elsewhere(session: Any) -> list[str]:
    """Return the nodes that do not run on the GPU, but for arithmetic on the text's length."""
    return [
        f"{node.name} ({node.op_type}): {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDER
        for node in part.get_nodes()
        if not node.name.startswith(ON_CPU)
    ]


def _one_pair(manifest: EngineManifest, gpu: GpuArrays) -> tuple[Batch, DeviceArray]:
    """Return a batch of one pair on the GPU, and where its score goes."""
    sizes, bucket = manifest.bundle.sizes, min(manifest.profile.text_buckets)
    arrays: dict[str, Any] = {
        "text_ids": np.zeros((1, bucket), np.int32),
        "text_length": np.full(1, bucket, np.int32),
        "query_of_pair": np.zeros(1, np.int32),
        "visual_tokens": np.zeros((1, sizes.num_tokens, sizes.hidden), manifest.token_dtype),
    }
    if manifest.token_dtype == "int8":
        arrays[VISUAL_SCALES] = np.zeros((1, sizes.num_tokens), np.float16)
    on_gpu: dict[str, Any] = {name: gpu.upload(array) for name, array in arrays.items()}
    return Batch(**on_gpu), gpu.result((1,), "float32")
