"""The libraries that we call, called directly on the model that our engine compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...arrays import Float32
from ...bundle import INPUTS
from ...engines.contract import BESIDE_8_BITS, Batch
from ...engines.manifest import EngineManifest
from ..random_model import Pairs
from .contest import Ask, Bench, Question, Run, SkippedError
from .ours import engine_of

ELEMENT_TYPES = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # beside int8 products
LATENCY, THROUGHPUT = "LATENCY", "THROUGHPUT"


def openvino_directly(precision: str, hint: str, batch: int) -> Callable[[Bench], Ask]:
    """Return what opens OpenVINO on our engine's model, set up as its documentation says.

    With the hint LATENCY one request after the other takes all cores; with THROUGHPUT OpenVINO
    chooses the streams and its own queue keeps them busy. All arrays lie ready in memory.
    """

    def make(bench: Bench) -> Ask:
        folder = engine_of(bench, "openvino", precision)
        from ...engines.openvino_core import openvino_core

        manifest = EngineManifest.read(folder)
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": hint,
            "INFERENCE_PRECISION_HINT": manifest.build_options.get(
                BESIDE_8_BITS, ELEMENT_TYPES[precision]
            ),
        }
        group = manifest.build_options.get("dynamic_quantization_group_size")
        if group is not None:
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = group
        compiled = openvino_core().compile_model(folder / "joint_encoder.xml", "CPU", settings)
        score = one_by_one if hint == LATENCY else queued
        return lambda question, num_pairs: score(
            compiled, batches_of(question, manifest, num_pairs, batch)
        )

    return make


def batches_of(
    question: Question, manifest: EngineManifest, num_pairs: int, size: int
) -> list[Batch]:
    """Return the first pairs in batches of `size`, the text padded to the engine's bucket."""
    ids = question.pairs.text_ids
    length = ids.shape[1]
    buckets = [one for one in manifest.profile.text_buckets if one >= length]
    if not buckets:
        raise SkippedError(f"the engine takes texts of {manifest.profile.text_buckets[-1]} ids")
    padded = np.zeros((1, min(buckets)), np.int32)
    padded[:, :length] = ids
    tokens = question.pairs.tokens[:num_pairs]
    return Pairs(question.pairs.num_wordpieces, padded, tokens).batches(size)


def queued(compiled: Any, batches: Sequence[Batch]) -> Run:
    """Return a run of the library's own queue, which keeps every stream busy."""
    import openvino as ov

    queue, parts = ov.AsyncInferQueue(compiled), [np.empty(0, np.float32) for _ in batches]
    feeds = [feed_of(batch) for batch in batches]

    def keep(request: Any, index: int) -> None:
        parts[index] = request.get_output_tensor(0).data.copy()

    queue.set_callback(keep)

    def run() -> Float32:
        for index, feed in enumerate(feeds):
            queue.start_async(feed, userdata=index, share_inputs=True)
        queue.wait_all()
        return np.concatenate(parts)

    return run


def one_by_one(compiled: Any, batches: Sequence[Batch]) -> Run:
    """Return a loop of the library's own calls over arrays that lie ready."""
    request, feeds = compiled.create_infer_request(), [feed_of(batch) for batch in batches]

    def run() -> Float32:
        parts = [request.infer(feed, share_inputs=True)["scores"].copy() for feed in feeds]
        return np.concatenate(parts)

    return run


def onnxruntime_directly(precision: str, batch: int) -> Callable[[Bench], Ask]:
    """Return what opens ONNX Runtime on our engine's graph, with its defaults."""

    def make(bench: Bench) -> Ask:
        folder = engine_of(bench, "onnxruntime", precision)
        import onnxruntime as ort

        manifest = EngineManifest.read(folder)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(
            str(folder / "joint_encoder.onnx"), options, providers=["CPUExecutionProvider"]
        )

        def ask(question: Question, num_pairs: int) -> Run:
            batches = batches_of(question, manifest, num_pairs, batch)
            feeds = [feed_of(one) for one in batches]
            return lambda: np.concatenate([session.run(["scores"], feed)[0] for feed in feeds])

        return ask

    return make


def feed_of(batch: Batch) -> dict[str, Any]:
    """Return the arrays of a batch by the graph's names."""
    return {name: getattr(batch, name) for name in INPUTS}
