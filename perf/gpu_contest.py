"""Pairs with known scores, and an engine's speed over them: bare, and through our pipeline.

Bare: tokens lie on the GPU, batches follow each other on one stream. Pipeline: tokens lie in host
memory at random rows, and everything from there to scores on the host counts. Resident: the same
with all tokens in a pool on the GPU. They take turns in one process over the same number of pairs;
the scores of all are compared with float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np

from ..arrays import Float32, Int64
from ..bundle import INPUTS, BundleManifest, ModelSizes
from ..engines.agreement import rank_agreement
from ..engines.contract import Batch, Engine
from ..engines.fidelity import reference_scorer
from ..engines.manifest import Profile
from ..kernels.device.contract import Device
from ..kernels.device.measuring import GpuArrays, gpu_arrays
from ..runtime.pipeline import Pipeline, Request, Scored
from ..runtime.pool import TokenPool
from ..runtime.source import HeldTokens
from ..runtime.streams import Streams
from ..runtime.text import TokenizedQueries
from .gpu_ceilings import slots_of
from .gpu_steps import Report
from .harness import interleave
from .random_model import SEED, Pairs, random_tokens

NUM_WORDPIECES = (13, 61)
# The most telling first: whatever the time is too short for comes last.
BATCH_SIZES = (256, 1024, 64, 4096, 32, 128, 512, 2048)
NUM_PAIRS = 4096
NUM_RESIDENT = 4  # batches on the GPU that the bare engine goes around
NUM_ROUNDS, LEAST_ROUNDS, POINT_S = 7, 3, 1.5
LEAST_TAU = 0.8  # random weights: int8 has about 0.9, a wrong engine about 0
CPU_PAIRS = 32  # that the float32 reference scores where PyTorch sees no GPU
STAGES = ("gather_ms", "upload_ms", "compute_ms", "download_ms")
BARE, PIPELINE, RESIDENT = "bare", "pipeline", "resident"

Scores = Callable[[], Float32]


def make_pairs(folder: Path, lengths: Sequence[int], num_pairs: int = NUM_PAIRS) -> list[Pairs]:
    """Return seeded random pairs for queries of each of `lengths` wordpieces, with their scores."""
    bundle = BundleManifest.read(folder)
    sizes, text = bundle.sizes, bundle.text
    tokens = random_tokens(num_pairs, sizes)
    random = np.random.default_rng(SEED)
    ids = random.integers(0, sizes.vocab_size, (1, text.max_wordpieces + 2)).astype(np.int32)
    made = []
    for length in lengths:
        text_ids = ids[:, : length + 2].copy()
        text_ids[0, 0], text_ids[0, -1] = text.cls_id, text.sep_id
        made.append(Pairs(length, text_ids, tokens))
    return scored(folder, made, num_pairs)


def scored(folder: Path, made: Sequence[Pairs], most: int = NUM_PAIRS) -> list[Pairs]:
    """Return the pairs with the scores of the first of them in float32, `most` at most."""
    score, reference = float32_scorer(folder)
    count = most if reference.startswith("PyTorch") else min(CPU_PAIRS, most)
    return [
        replace(p, expected=score(p.batch(0, min(count, len(p.tokens)))), reference=reference)
        for p in made
    ]


def float32_scorer(folder: Path) -> tuple[Callable[[Batch], Float32], str]:
    """Return what scores a batch in float32, and its name: PyTorch on the GPU if it sees one."""
    try:
        import torch
    except ImportError:
        return reference_scorer(folder), "ONNX Runtime fp32, CPU"
    if not torch.cuda.is_available():
        return reference_scorer(folder), "ONNX Runtime fp32, CPU"
    return torch_scorer(folder, "cuda"), "PyTorch fp32, GPU"


def torch_scorer(folder: Path, device: str, part: int = 512) -> Callable[[Batch], Float32]:
    """Return the lean scorer in float32 on `device`, `part` pairs at a time, TF32 off."""
    import torch

    from .scorers import load_scorer

    torch.backends.cuda.matmul.allow_tf32 = False
    scorer = load_scorer(folder, device=device)

    def score(batch: Batch) -> Float32:
        with torch.inference_mode():
            ids = torch.from_numpy(batch.text_ids).to(device)
            asks = torch.from_numpy(batch.query_of_pair).to(device)
            pieces = [
                scorer(ids, asks[s : s + part], torch.from_numpy(tokens).to(device))
                for s in range(0, len(batch), part)
                for tokens in [batch.visual_tokens[s : s + part]]
            ]
            scores: Float32 = torch.cat(pieces).cpu().numpy()
            return scores

    return score


def profile_of(lengths: Iterable[int], batch_sizes: Iterable[int]) -> Profile:
    """Return the profile of an engine for queries that fill their buckets."""
    return Profile(max(batch_sizes), tuple(sorted(length + 2 for length in set(lengths))))


def agreement(pairs: Pairs, rows: Int64, scores: Float32) -> dict[str, Any]:
    """Compare scores of `rows` with float32: max and mean difference, Kendall's tau, finite."""
    known = rows < len(pairs.expected)
    found = rank_agreement([pairs.expected[rows[known]]], [scores[known]])
    return {
        "max_abs_diff": found.max_abs_diff,
        "mean_abs_diff": found.mean_abs_diff,
        "kendall_tau": found.kendall_tau,
        "num_pairs": found.num_pairs,
        "reference": pairs.reference,
    }


def agreement_fault(compared: dict[str, Any]) -> str | None:
    """Return why scores cannot be those of the model, None where they can."""
    if np.isfinite(compared["max_abs_diff"]) and compared["kendall_tau"] >= LEAST_TAU:
        return None
    return (
        f"scores disagree with float32: Kendall tau {compared['kendall_tau']:.3f}, "
        f"largest difference {compared['max_abs_diff']:.2g}"
    )


def compare(contestants: dict[str, Scores], rows: Int64, pairs: Pairs) -> list[dict[str, Any]]:
    """Warm everybody up, check their scores of `rows`, time them in turns; return a row each.

    A row whose scores are wrong has a `fault` and no speed.
    """
    compared = {name: agreement(pairs, rows, run()) for name, run in contestants.items()}
    began = perf_counter()
    for run in contestants.values():
        run()
    one_round = perf_counter() - began
    num_rounds = max(LEAST_ROUNDS, min(NUM_ROUNDS, round(POINT_S / max(one_round, 1e-6))))
    timings = interleave(contestants, pairs=len(rows), num_rounds=num_rounds)
    made = []
    for name, timing in timings.items():
        fault = agreement_fault(compared[name])
        speed = asdict(timing) if fault is None else {"pairs_per_s": None}
        made.append({**speed, "via": name, "agreement": compared[name], "fault": fault})
    return made


def measure_engine(
    report: Report,
    name: str,
    engine: Engine,
    all_pairs: Sequence[Pairs],
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> None:
    """Report rows for every length and batch size, until the time is up."""
    measure_points(
        report,
        {"engine": name, "precision": engine.manifest.precision},
        engine.manifest.bundle.sizes,
        all_pairs,
        batch_sizes,
        lambda pairs, size: measure_point(engine, pairs, size),
    )


def measure_points(
    report: Report,
    facts: dict[str, Any],
    sizes: ModelSizes,
    all_pairs: Sequence[Pairs],
    batch_sizes: Sequence[int],
    measure: Callable[[Pairs, int], list[dict[str, Any]]],
) -> None:
    """Report what `measure` gives for every length and size; what it raises is a row's fault."""
    for size in batch_sizes:
        for pairs in all_pairs:
            slots = slots_of(pairs.num_wordpieces, sizes)
            point = {"wordpieces": pairs.num_wordpieces, "slots": slots, "batch": size}
            if report.left_s <= 0:
                report.add("left_out", point)
                continue
            try:
                rows = measure(pairs, size)
            except Exception as error:  # out of memory, a lost device: a row, not an end
                fault = " ".join(f"{type(error).__name__}: {error}".split())[:400]
                rows = [{"via": "", "pairs_per_s": None, "fault": fault}]
            for row in rows:
                report.add("rows", {**facts, **point, **row})


def measure_point(engine: Engine, pairs: Pairs, size: int) -> list[dict[str, Any]]:
    """Measure one batch size: bare, and through the pipeline, tokens on the host and resident."""
    from ..kernels.device.cuda_core import CudaCoreDevice

    num_batches = max(NUM_RESIDENT, NUM_PAIRS // size)
    rows = np.arange(num_batches * size) % (NUM_RESIDENT * size) % len(pairs.tokens)
    with ExitStack() as stack:
        stack.enter_context(_narrowed(engine, size))
        device = stack.enter_context(closing(CudaCoreDevice()))
        gpu = stack.enter_context(gpu_arrays())
        streams = Streams(device, borrowed=gpu.stream, exclusive=True)  # contestants take turns
        pipelines = make_pipelines(engine, pairs, device, streams)
        last: dict[str, Scored] = {}
        contestants = {BARE: bare_scores(engine, pairs, size, num_batches, gpu)}
        for name, pipeline in pipelines.items():
            stack.enter_context(closing(pipeline))
            contestants[name] = through_pipeline(pipeline, pairs, rows, name, last)
        made = compare(contestants, rows, pairs)
    bare_speed = made[0]["pairs_per_s"]
    for row in made[1:]:
        took = last[row["via"]]
        row["stages_ms"] = {name: round(getattr(took, name) / num_batches, 4) for name in STAGES}
        both = row["pairs_per_s"] and bare_speed
        row["share_of_bare"] = round(row["pairs_per_s"] / bare_speed, 4) if both else None
    return made


def make_pipelines(
    engine: Engine, pairs: Pairs, device: Device, streams: Streams
) -> dict[str, Pipeline]:
    """Return pipelines over the same tokens: in host memory, and all of them resident."""
    every, sizes = np.arange(len(pairs.tokens)), engine.manifest.bundle.sizes
    source = HeldTokens(every, pairs.tokens)
    pool = TokenPool(
        device,
        every,
        len(every),
        shape=(sizes.num_tokens, sizes.hidden),
        dtype="float16",
        checks_finite=False,
    )
    resident = Pipeline(engine, source, device, streams=streams, pool=pool)
    resident.load(every)
    return {PIPELINE: Pipeline(engine, source, device, streams=streams), RESIDENT: resident}


def through_pipeline(
    pipeline: Pipeline, pairs: Pairs, rows: Int64, name: str, last: dict[str, Scored]
) -> Scores:
    """Return a run of all `rows`, shuffled, giving scores in their order; `last` gets its times."""
    length = np.array([pairs.text_ids.shape[1]], np.int32)
    queries = TokenizedQueries(pairs.text_ids, length, np.zeros(1, np.bool_))
    order = np.random.default_rng(SEED).permutation(len(rows))
    request = Request(queries, np.zeros(len(rows), np.int64), rows[order].astype(np.int64))

    def run() -> Float32:
        last[name] = pipeline.run(request)
        scores = np.empty(len(rows), np.float32)
        scores[order] = last[name].scores
        return scores

    return run


def bare_scores(
    engine: Engine, pairs: Pairs, size: int, num_batches: int, gpu: GpuArrays
) -> Scores:
    """Return a run over batches that lie on the GPU, the scores fetched at its end."""
    batches = []
    for index in range(NUM_RESIDENT):
        batch = pairs.batch(index * size, size)
        arrays = {name: np.ascontiguousarray(getattr(batch, name)) for name in INPUTS}
        on_gpu: dict[str, Any] = {name: gpu.upload(array) for name, array in arrays.items()}
        batches.append(Batch(**on_gpu))
    results = [gpu.result((size,), "float32") for _ in batches]
    outs = [cast(Float32, result) for result in results]

    def run() -> Float32:
        for index in range(num_batches):
            turn = index % NUM_RESIDENT
            engine.enqueue(batches[turn], outs[turn], stream=gpu.stream)
        parts = gpu.download(*results)
        return np.concatenate([parts[index % NUM_RESIDENT] for index in range(num_batches)])

    return run


@contextmanager
def _narrowed(engine: Engine, max_pairs: int) -> Iterator[None]:
    """Let the engine plan batches of `max_pairs` for a while; it accepts larger ones."""
    whole = engine.manifest
    engine.manifest = replace(whole, profile=Profile(max_pairs, whole.profile.text_buckets))
    try:
        yield
    finally:
        engine.manifest = whole
