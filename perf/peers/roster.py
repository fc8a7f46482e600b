"""Who takes part, by the ids that tables, the JSON and `PLAN.md` share."""

from __future__ import annotations

from ..subjects import AUTO
from .contest import Contestant, Function
from .direct import LATENCY, THROUGHPUT, onnxruntime_directly, openvino_directly
from .exported import DYNAMIC, OPTIMIZED, PLAIN, exported
from .others import blip, cross_encoder, max_sim
from .ours import ranked
from .pytorch import compiled, eager

OFFICIAL = "hf-official-fp32"
# Pairs of a turn, so that it takes half a second: what takes 30 ms a pair scores few, what takes 2
# ms many. At least a batch of everybody's.
FEW, SOME, MANY = 32, 64, 256
OPENVINO = {"int8": MANY, "bf16": 128, "fp32": SOME}
ONNXRUNTIME = {"int8": SOME, "fp32": SOME}
# How OpenVINO is called directly: its hint, and pairs a request.
MODES = {"latency": (LATENCY, 32), "throughput": (THROUGHPUT, 16)}


def on_cpu(num_candidates: int) -> list[Contestant]:
    """Return everybody who runs on a CPU.

    Args:
        num_candidates: that `auto` ranks in one turn.
    """
    auto = Contestant(AUTO, "edje, auto", num_candidates, ranked(AUTO), "rounded", "ours")
    return [auto, *_our_engines(), *_libraries(), *_pytorch(), *_exports(), *_others()]


def on_gpu(num_candidates: int) -> list[Contestant]:
    """Return who runs on an NVIDIA GPU: ours, and PyTorch's in float16 with all candidates."""
    ours = [
        Contestant(AUTO, "edje, auto", num_candidates, ranked(AUTO), "rounded", "ours"),
        *(
            Contestant(
                f"native-{precision}",
                f"edje, native {precision}",
                num_candidates,
                ranked("native", precision),
                "rounded",
                "ours",
            )
            for precision in ("fp16", "int8", "fp8")
        ),
    ]
    half, count = "float16", num_candidates
    encoder, online = cross_encoder("torch", half), blip(online=True)
    return [
        *ours,
        Contestant(OFFICIAL, "Hugging Face eager, official, fp32", count, eager(trimmed=False)),
        *(
            Contestant(f"hf-{name}-fp16", f"{words}, fp16", count, make, "rounded")
            for name, words, make in (
                ("official", "Hugging Face eager, official", eager(trimmed=False, dtype=half)),
                ("trimmed", "Hugging Face eager, trimmed", eager(trimmed=True, dtype=half)),
                ("compiled", "torch.compile", compiled(half)),
            )
        ),
        Contestant("cross-encoder-torch-fp16", "CrossEncoder, fp16 SDPA", count, encoder, "other"),
        Contestant(
            "blip-cached", "BLIP-L, features at hand, fp32", 64, blip(online=False), "other"
        ),
        Contestant("blip-online", "BLIP-L, images online, fp32", 16, online, "other"),
    ]


def _function(precision: str) -> Function:
    return "float32" if precision == "fp32" else "rounded"


def _our_engines() -> list[Contestant]:
    """Return every CPU engine of ours, with those that call its library directly."""
    openvino = [
        Contestant(
            f"openvino-{precision}",
            f"edje, OpenVINO {precision}",
            pairs,
            ranked("openvino", precision),
            _function(precision),
            "ours",
            tuple(f"openvino-direct-{precision}-{mode}" for mode in MODES),
        )
        for precision, pairs in OPENVINO.items()
    ]
    onnxruntime = [
        Contestant(
            f"onnxruntime-{precision}",
            f"edje, ONNX Runtime {precision}",
            pairs,
            ranked("onnxruntime", precision),
            _function(precision),
            "ours",
            (f"onnxruntime-direct-{precision}",),
        )
        for precision, pairs in ONNXRUNTIME.items()
    ]
    return openvino + onnxruntime


def _libraries() -> list[Contestant]:
    """Return the libraries called directly, each on the graph of our engine."""
    openvino = [
        Contestant(
            f"openvino-direct-{precision}-{mode}",
            f"OpenVINO {precision}, {mode} hint",
            pairs,
            openvino_directly(precision, hint, batch),
            _function(precision),
            "library",
        )
        for precision, pairs in OPENVINO.items()
        for mode, (hint, batch) in MODES.items()
    ]
    onnxruntime = [
        Contestant(
            f"onnxruntime-direct-{precision}",
            f"ONNX Runtime {precision}",
            pairs,
            onnxruntime_directly(precision, 32),
            _function(precision),
            "library",
        )
        for precision, pairs in ONNXRUNTIME.items()
    ]
    return openvino + onnxruntime


def _pytorch() -> list[Contestant]:
    """Return Hugging Face's model in PyTorch."""
    made = []
    for dtype, name in (("float32", "fp32"), ("bfloat16", "bf16")):
        function = _function(name)
        official, trimmed = (eager(trimmed=trim, dtype=dtype) for trim in (False, True))
        made += [
            Contestant(
                f"hf-official-{name}",
                f"Hugging Face eager, official, {name}",
                FEW,
                official,
                function,
            ),
            Contestant(
                f"hf-trimmed-{name}",
                f"Hugging Face eager, trimmed, {name}",
                FEW,
                trimmed,
                function,
            ),
            Contestant(
                f"hf-compiled-{name}", f"torch.compile, {name}", FEW, compiled(dtype), function
            ),
        ]
    return made


def _exports() -> list[Contestant]:
    """Return PyTorch's export in ONNX Runtime."""
    optimized, dynamic = exported(OPTIMIZED), exported(DYNAMIC)
    return [
        Contestant("ort-export", "ONNX Runtime, PyTorch's export", FEW, exported(PLAIN)),
        Contestant("ort-optimized", "ONNX Runtime, its optimiser", FEW, optimized),
        Contestant("ort-dynamic-int8", "ONNX Runtime, dynamic int8", FEW, dynamic, "rounded"),
    ]


def _others() -> list[Contestant]:
    """Return those who compute other scores."""
    encoders = [
        Contestant(
            f"cross-encoder-{backend}-{name}",
            f"CrossEncoder on text, {backend} {name}",
            FEW,
            cross_encoder(backend, dtype),
            "other",
        )
        for backend, dtype, name in (
            ("torch", "float32", "fp32"),
            ("torch", "bfloat16", "bf16"),
            ("onnx", "float32", "fp32"),
            ("openvino", "float32", "fp32"),
        )
    ]
    cached, online = (blip(online=is_online) for is_online in (False, True))
    return [
        *encoders,
        Contestant("blip-cached", "BLIP-L, features at hand, fp32", 2, cached, "other"),
        Contestant("blip-online", "BLIP-L, images online, fp32", 1, online, "other", is_slow=True),
        Contestant("max-sim", "MaxSim over the same store", MANY, max_sim, "other"),
    ]
