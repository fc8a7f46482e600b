"""The steps of `make gpu`: what each does in its own process."""

from __future__ import annotations

import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..arrays import Float32
from ..bundle import BundleManifest
from ..engines.contract import Batch, Engine
from ..engines.fidelity import reference_scorer
from ..engines.registry import probe_backends
from ..errors import EdjeError
from ..kernels.device import GPU_DEVICES, open_gpu
from ..kernels.device.facts import current_gpu
from ..kernels.device.measuring import measure_copies
from . import bench_feed, bench_precisions, gpu_tune
from . import gpu_contest as contest
from .gpu_ceilings import measure_ceilings
from .gpu_contest import BATCH_SIZES, NUM_WORDPIECES, make_pairs, measure_engine, profile_of
from .gpu_engines import TorchEngine, built_engine
from .gpu_rank import measure_rank
from .gpu_steps import Report
from .harness import ROOT, versions
from .random_model import Pairs, full_size_bundle

LIBRARIES = (
    "numpy", "cuda-bindings", "cuda-core", "pycuda", "torch",
    "triton", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt",
    "tensorrt-rtx-cu13-bindings", "pytest",
)  # fmt: skip
LEAN_WORDPIECES = (*NUM_WORDPIECES, 12, 29)  # 80 and 128 slots, then 79 and 96
CPU_ROUNDS = 3
FEED_ROUNDS = 10
FEW_BATCHES = (256, 1024)  # for the lengths that compiling leaves little time for
FLOAT32_TOLERANCE = 1e-3
NUM_CHECKED = 16
MOST_TEXT = 8192  # characters of a failing test's output, its end


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to run.

    Attributes:
        name, help: for the command line.
        limit_s: seconds after which it is killed.
        run: does it, in its own process.
    """

    name: str
    help: str
    limit_s: float
    run: Callable[[Report], None]


def look_around(report: Report) -> None:
    """Report the GPU, the versions of the libraries, and what each backend can run."""
    report.put(gpu=asdict(current_gpu()), python=platform.python_version())
    backends = {
        status.name: {"version": status.version, "precisions": dict(status.runs)}
        for status in probe_backends()
    }
    report.put(versions=versions(LIBRARIES), backends=backends)
    report.put(torch=_torch_facts(), onnxruntime_providers=_providers())
    report.put(copies={name: copies_of(name) for name in GPU_DEVICES})


def copies_of(name: str) -> dict[str, Any]:
    """Return how a device's pinned memory is copied, or in `fault` why that is not known."""
    try:
        device = open_gpu(name)
    except EdjeError as error:
        return {"fault": error.message}
    with closing(device):
        speed = measure_copies(device)
    return {**asdict(speed), "blocks": speed.blocks, "text": speed.describe(), "fault": None}


def run_tests(report: Report) -> None:
    """Run `pytest -m gpu` over the files that have such tests; report counts and failures.

    Raises:
        EdjeError: pytest itself could not run them.
    """
    import pytest

    files = [
        str(path)
        for path in sorted((ROOT.resolve() / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    with TemporaryDirectory() as scratch:
        xml = Path(scratch) / "junit.xml"
        arguments = ["-m", "gpu", "-q", f"--rootdir={ROOT.resolve()}", f"--junitxml={xml}", *files]
        status = int(pytest.main([*arguments, "-p", "no:cacheprovider"]))
        if xml.is_file():
            report.put(**counts_of(xml.read_text(encoding="utf-8")))
    if status not in (0, 1):
        raise EdjeError(f"pytest ended with status {status}, expected 0 or 1")


def counts_of(junit: str) -> dict[str, Any]:
    """Return how many tests passed, failed and were skipped, with the reasons and the output."""
    cases = list(ElementTree.fromstring(junit).iter("testcase"))
    bad = {_name(case): part for case in cases for kind in ("failure", "error")
           if (part := case.find(kind)) is not None}  # fmt: skip
    skipped = {_name(case): part.get("message", "") for case in cases
               if (part := case.find("skipped")) is not None}  # fmt: skip
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
        "skip_reasons": sorted(set(skipped.values())),
        "failures": list(bad),
        "failure_texts": {name: (part.text or "")[-MOST_TEXT:] for name, part in bad.items()},
    }


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def prepare(report: Report) -> None:
    """Export the model; check that the float32 reference is the bundle's own graph.

    Raises:
        EdjeError: it is not.
    """
    folder = full_size_bundle()
    [pairs] = make_pairs(folder, NUM_WORDPIECES[:1], NUM_CHECKED)
    exact = reference_scorer(folder)(pairs.batch(0, NUM_CHECKED))
    difference = float(np.abs(pairs.expected - exact).max())
    report.put(
        reference=pairs.reference,
        max_abs_diff_to_the_bundle=difference,
        num_pairs=NUM_CHECKED,
    )
    if not difference <= FLOAT32_TOLERANCE:
        raise EdjeError(f"{pairs.reference} differs from the bundle by {difference:.1e}")


def measure_official(report: Report) -> None:
    """Measure PyTorch eager in float16 as the official code runs it, tokens here and there."""
    from .scorers import official_scorer

    folder = full_size_bundle()
    score = official_scorer(device="cuda", dtype="float16")
    contest.measure_points(
        report,
        {"engine": "PyTorch eager, official", "precision": "fp16"},
        BundleManifest.read(folder).sizes,
        make_pairs(folder, NUM_WORDPIECES),
        BATCH_SIZES,
        partial(_measure_official_point, score),
    )


def _measure_official_point(
    score: Callable[[Batch], Float32], pairs: Pairs, size: int
) -> list[dict[str, Any]]:
    """Measure one batch size: tokens on the GPU, and from host memory as NumPy holds them."""
    import torch

    num_batches = max(1, contest.NUM_PAIRS // size // 4)
    rows = np.arange(num_batches * size) % len(pairs.tokens)
    on_host = [pairs.batch(index * size, size) for index in range(num_batches)]
    tokens: Any = torch.from_numpy(pairs.tokens).cuda()
    on_device = [
        replace(batch, visual_tokens=tokens[start : start + size])
        for index, batch in enumerate(on_host)
        for start in [index * size % len(tokens)]
    ]

    def over(batches: list[Batch]) -> Float32:
        return np.concatenate([score(batch) for batch in batches])

    runs = {contest.BARE: lambda: over(on_device), "from host": lambda: over(on_host)}
    return contest.compare(runs, rows, pairs)


def measure_compiled(report: Report) -> None:
    """Measure our lean PyTorch module: torch.compile, fused attention, CUDA graphs, float16."""
    name = "torch.compile, CUDA graphs"
    folder = full_size_bundle()
    all_pairs = make_pairs(folder, LEAN_WORDPIECES)
    engine = TorchEngine(folder, profile_of(LEAN_WORDPIECES, BATCH_SIZES))
    usual, rest = all_pairs[: len(NUM_WORDPIECES)], all_pairs[len(NUM_WORDPIECES) :]
    measure_engine(report, name, engine, usual, FEW_BATCHES)
    measure_engine(report, name, engine, rest, FEW_BATCHES)
    others = [size for size in BATCH_SIZES if size not in FEW_BATCHES]
    measure_engine(report, name, engine, usual, others)


def measure_tiles(report: Report) -> None:
    """Report what `make tune` would write for this GPU; the checkout stays as it is."""
    capability, table = gpu_tune.measure(gpu_tune.PAIRS, min(gpu_tune.BUDGET_S, report.left_s))
    report.put(tuning={"compute_capability": capability, **asdict(table)})


def measure_cpu(report: Report) -> None:
    """Measure the engines of this machine's CPU in every precision it runs; report one result.

    Raises:
        EdjeError: contestants disagree on the scores.
    """
    report.put(cpu=bench_precisions.measure(CPU_ROUNDS, None, _tell))


def measure_feed(report: Report) -> None:
    """Report what this machine's disk and memory feed an engine that takes no time.

    Raises:
        EdjeError: what was fed is not what is stored.
    """
    with TemporaryDirectory(prefix="edje-feed-") as scratch:
        report.put(feed=bench_feed.measure(FEED_ROUNDS, Path(scratch)))


def _measure_opened(name: str, open_engine: Callable[[Path], Engine], report: Report) -> None:
    """Measure an engine; where it cannot be opened at all, the step fails with the reason."""
    folder = full_size_bundle()
    engine = open_engine(folder)
    try:
        measure_engine(report, name, engine, make_pairs(folder, NUM_WORDPIECES))
    finally:
        engine.close()


def _backend(backend: str, precision: str) -> Callable[[Report], None]:
    profile = profile_of(NUM_WORDPIECES, BATCH_SIZES)
    return partial(
        _measure_opened,
        f"{backend} {precision}",
        lambda folder: built_engine(folder, backend, precision, profile, _tell),
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _torch_facts() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"fault": str(error)}
    if not torch.cuda.is_available():
        return {"version": torch.__version__, "fault": "it sees no GPU"}
    facts = torch.cuda.get_device_properties(0)
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "memory_bytes": facts.total_memory,
        "num_multiprocessors": facts.multi_processor_count,
        "l2_bytes": getattr(facts, "L2_cache_size", None),
    }


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError as error:
        return [str(error)]
    return list(onnxruntime.get_available_providers())


STEPS = (
    Step("found", "GPU, driver, libraries and backends", 60, look_around),
    Step("tests", "pytest -m gpu", 150, run_tests),
    Step("ceilings", "copies and matrix products of this GPU", 75, measure_ceilings),
    Step("prepare", "export the model, check the float32 reference", 100, prepare),
    Step("tune", "the tiles of our own kernels' products", 100, measure_tiles),
    Step("native-fp16", "our own kernels, fp16", 70, _backend("native", "fp16")),
    Step("native-bf16", "our own kernels, bf16", 70, _backend("native", "bf16")),
    Step(
        "native-int8",
        "our own kernels, int8",
        120,
        _backend("native", "int8"),
    ),
    Step("native-fp8", "our own kernels, fp8", 120, _backend("native", "fp8")),
    Step("eager", "PyTorch eager fp16, the official way", 75, measure_official),
    Step("rank", "Reranker.rank of 25,000 images, and what can be fed", 120, measure_rank),
    Step("compiled", "torch.compile + SDPA + CUDA graphs, fp16", 190, measure_compiled),
    Step("onnxruntime-fp16", "ONNX Runtime CUDA fp16", 70, _backend("onnxruntime-cuda", "fp16")),
    Step("onnxruntime-fp32", "ONNX Runtime CUDA fp32", 70, _backend("onnxruntime-cuda", "fp32")),
    Step("tensorrt-fp16", "TensorRT fp16", 120, _backend("tensorrt", "fp16")),
    Step("tensorrt-int8", "TensorRT int8", 120, _backend("tensorrt", "int8")),
    Step("tensorrt-fp8", "TensorRT fp8", 120, _backend("tensorrt", "fp8")),
    Step("rtx-fp16", "TensorRT-RTX fp16", 100, _backend("tensorrt-rtx", "fp16")),
    Step("rtx-fp8", "TensorRT-RTX fp8", 100, _backend("tensorrt-rtx", "fp8")),
    Step("feed", "reading from disk and host memory, by threads", 60, measure_feed),
    Step("cpu", "this machine's CPU: OpenVINO and ONNX Runtime", 150, measure_cpu),
)
