"""The `onnxruntime` backend: float32 and int8 on every CPU. The graph as it is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..arrays import Float32, even_parts
from ..bundle import JOINT_ENCODER, OUTPUT, ModelSizes
from ..errors import EngineError
from ..machine import is_x86, whole_cores
from .build_options import BuildOptions
from .contract import Batch, BuildJob, Engine, HostEngine, OpenOptions
from .cpu import compute_type as compute_type
from .cpu import cpu_features, option_fault, why_no_vnni
from .cpu import device as device
from .cpu import device_faults as device_faults
from .manifest import EngineManifest
from .scales import DYNAMIC, ONLY_STATIC, STATIC, Scales

MODEL = JOINT_ENCODER
PROVIDER = "CPUExecutionProvider"
PRECISIONS = ("fp32", "int8")
# Time of the layers' products in int8 against float32, the quantising included, by the AVX2 kernels
# with static scales and with one a row: full size, 16 pairs, one core, 1.32.0.
STATIC_COST, ROW_COST = 0.53, 0.56
# It keeps more between its nodes than OpenVINO. CPU time a pair, full size, one core of an AMD EPYC
# with 1 MB L2, int8 and float32: 6.5 and 16.8 ms at 8 pairs, 7.1 and 17.6 at 16 (32: 7.6, 20.1).
PAIRS_PER_THREAD = 8
_ERRORS_ONLY = 3  # ORT's severity scale; its warnings at open are not for our users


def version() -> str:
    """Return ONNX Runtime's version."""
    return str(ort.__version__)


def why_not(precision: str) -> str | None:
    """Return why this machine cannot run `precision`, None where it can."""
    if precision not in PRECISIONS:
        return "the CPU provider computes matrix products in float32 and int8 only"
    if PROVIDER not in ort.get_available_providers():
        return f"this onnxruntime was built without {PROVIDER}"
    if precision == "int8" and why_no_vnni() is not None and "avx2" not in cpu_features():
        return "this CPU has neither VNNI nor AVX2 (or may not use them): int8 would be slow"
    return None


def activation_scales(precision: str, sizes: ModelSizes) -> tuple[Scales, ...]:
    """Return how int8 activations can be scaled: without VNNI also a row at a time.

    Weights have 7 bits there: sums cannot overflow. The kernels for two unsigned bytes take weights
    of 8 bits, but are slower (1.37 times float32 against 1.55), and no more faithful to speak of:
    tau 0.918 against 0.915 with everything in int8, trained weights of 6 layers.
    """
    if precision != "int8" or why_no_vnni() is None:
        return ONLY_STATIC
    row = max(sizes.hidden, sizes.intermediate)
    return (
        Scales(STATIC, STATIC_COST, weight_bits=7),
        Scales(DYNAMIC, ROW_COST, row, weight_bits=7),
    )


def why_not_build(precision: str, options: BuildOptions) -> str | None:
    """Return why this machine cannot build `precision`: it must be able to run it."""
    return option_fault(options) or why_not(precision)


def build(job: BuildJob) -> Mapping[str, Any]:
    """Copy the graph, int8 in the form for x86: ONNX Runtime fuses it at opening.

    Storing it fused saves nothing: full size opens in 0.19 s of CPU time and scores 8 pairs in
    237 ms either way (1.32.0, one core of a Xeon with AVX-512).
    """
    fitted = job.precision == "int8" and is_x86()
    if fitted:
        from .onnxruntime_int8 import write_for_x86

        write_for_x86(job.graph, job.out / MODEL, has_vnni=why_no_vnni() is None)
    else:
        shutil.copyfile(job.graph, job.out / MODEL)
    return {"graph_optimization_level": "all, at opening", "fitted_to_x86": fitted}


def load(folder: Path, manifest: EngineManifest, options: OpenOptions) -> Engine:
    """Open the graph with every fusion on."""
    session = _session(folder / MODEL, _session_options(options.backend_settings))
    return OnnxRuntimeEngine(manifest, session, options.num_threads or whole_cores())


class OnnxRuntimeEngine(HostEngine):
    """Binds the caller's arrays as they lie: nothing is copied in or out.

    Every thread scores pairs of its own, instead of all threads sharing each node, where all wait
    (and burn their time waiting) for the slowest. Full size, 32 pairs, two cores that others used,
    too: 388 instead of 632 ms in int8, 535 instead of 682 in float32, and of CPU time 232 instead
    of 391 ms, and 529 instead of 685 (1.32.0).
    """

    def __init__(self, manifest: EngineManifest, session: ort.InferenceSession, num_threads: int):
        super().__init__(manifest, pairs_per_forward=PAIRS_PER_THREAD * num_threads)
        self._session: ort.InferenceSession | None = session
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(max(1, num_threads - 1), "edje-onnxruntime")

    def _infer(self, batch: Batch, scores: Float32) -> None:
        first, *others = even_parts(len(batch), -(-len(batch) // self._num_threads))
        started: list[Future[None]] = []
        try:
            for pairs in others:
                part, found = batch.part(pairs), scores[pairs]
                started.append(self._threads.submit(self._score, part, found))
            self._score(batch.part(first), scores[first])
        except RuntimeError as error:
            raise EngineError("the engine is closed") from error
        finally:  # whatever happened, none may still read or write the caller's arrays
            wait(started)
        for done in started:
            done.result()

    def _score(self, batch: Batch, scores: Float32) -> None:
        session = self._session
        if session is None:
            raise EngineError("the engine is closed")
        binding = session.io_binding()
        binding.bind_cpu_input("text_ids", batch.text_ids)
        binding.bind_cpu_input("text_length", batch.text_length)
        binding.bind_cpu_input("query_of_pair", batch.query_of_pair)
        binding.bind_cpu_input("visual_tokens", batch.visual_tokens)
        if batch.visual_scales is not None:
            binding.bind_cpu_input("visual_scales", batch.visual_scales)
        binding.bind_output(OUTPUT, "cpu", 0, np.float32, scores.shape, scores.ctypes.data)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ORT's exception classes share no base of their own
            raise EngineError(f"ONNX Runtime failed on a batch of {len(batch)}: {error}") from error

    def close(self) -> None:
        self._session = None
        self._threads.shutdown()


def _session_options(settings: Mapping[str, str]) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = 1  # a forward's own thread
    for name, value in settings.items():
        options.add_session_config_entry(name, value)
    return options


def _session(model: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(model), options, providers=[PROVIDER])
    except Exception as error:  # ORT's exception classes share no base of their own
        raise EngineError(f"ONNX Runtime cannot load {model}: {error}") from error
