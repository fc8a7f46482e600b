"""The model exported by PyTorch, as users do it, in ONNX Runtime: plain, optimised, in int8."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from ...arrays import Float32
from ...bundle import BundleManifest
from ...machine import is_x86
from .contest import Ask, Bench, Question, Run, SkippedError
from .pytorch import BATCH, joint_encoder

PLAIN, OPTIMIZED, DYNAMIC = "plain", "optimized", "dynamic"
OPSET = 18


def exported(kind: str) -> Callable[[Bench], Ask]:
    """Return what opens an export of Hugging Face's trimmed encoder.

    `plain` is `torch.onnx.export` with attention written out, the form that ONNX Runtime's
    transformer optimiser (`optimized`) knows; `dynamic` are that one's products in int8 with scales
    found while running, by `quantize_dynamic`.
    """

    def make(bench: Bench) -> Ask:
        if kind == DYNAMIC and bench.device != "cpu":
            raise SkippedError("dynamic int8 is for CPUs")
        import onnxruntime as ort

        wanted = "CPUExecutionProvider" if bench.device == "cpu" else "CUDAExecutionProvider"
        if wanted not in ort.get_available_providers():
            raise SkippedError(f"this onnxruntime has no {wanted}")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(str(model_file(bench, kind)), options, providers=[wanted])

        def ask(question: Question, num_pairs: int) -> Run:
            ids = question.pairs.text_ids.astype(np.int64)
            tokens = question.pairs.tokens[:num_pairs]
            feeds = [
                {"text_ids": ids, "visual_tokens": tokens[start : start + BATCH]}
                for start in range(0, num_pairs, BATCH)
            ]

            def run() -> Float32:
                return np.concatenate([session.run(None, feed)[0] for feed in feeds])

            return run

        return ask

    return make


def model_file(bench: Bench, kind: str) -> Path:
    """Return the ONNX file, made from the one before it."""
    plain, optimized, dynamic = (
        bench.scratch / f"{name}.onnx" for name in (PLAIN, OPTIMIZED, DYNAMIC)
    )
    path = {PLAIN: plain, OPTIMIZED: optimized, DYNAMIC: dynamic}[kind]
    if path.exists():
        return path
    if kind == PLAIN:
        _export(bench, plain)
    elif kind == OPTIMIZED:
        from onnxruntime.transformers import optimizer

        sizes = BundleManifest.read(bench.bundle).sizes
        with _quiet():
            model = optimizer.optimize_model(
                str(model_file(bench, PLAIN)),
                model_type="bert",
                num_heads=sizes.num_heads,
                hidden_size=sizes.hidden,
                use_gpu=bench.device != "cpu",
            )
        model.save_model_to_file(str(optimized))
    else:
        _quantize(model_file(bench, OPTIMIZED), dynamic)
    return path


def _export(bench: Bench, path: Path) -> None:
    encoder = deepcopy(joint_encoder(bench, trimmed=True)).cpu()
    encoder.bert.config._attn_implementation = "eager"
    sizes = BundleManifest.read(bench.bundle).sizes
    ids = torch.ones(1, 15, dtype=torch.long)
    tokens = torch.zeros(4, sizes.num_tokens, sizes.hidden, dtype=torch.float16)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            encoder,
            (ids, tokens),
            str(path),
            dynamo=False,  # the newer exporter needs onnxscript, and the optimiser knows this form
            opset_version=OPSET,
            input_names=["text_ids", "visual_tokens"],
            output_names=["scores"],
            dynamic_axes={"text_ids": {1: "T"}, "visual_tokens": {0: "P"}, "scores": {0: "P"}},
        )


def _quantize(model: Path, path: Path) -> None:
    """Quantise with the settings that ONNX Runtime recommends for this CPU."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    from ...engines.cpu import why_no_vnni

    with _quiet():
        quantize_dynamic(
            model,
            path,
            per_channel=True,
            reduce_range=is_x86() and why_no_vnni() is not None,  # else 16-bit sums overflow
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep advice that both tools log on every model from the table."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
