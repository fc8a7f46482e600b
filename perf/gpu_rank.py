"""End to end on a GPU: `Reranker.rank` over a real store, and how much can be fed at most.

25,000 images in a token store on disk (its page cache warm). Ranked is from the store, from host
memory and from the GPU's memory, against the bare engine over batches that lie on the GPU; then
the same ways with an engine that takes no time, which is what everything around an engine can
feed. All take turns in one process; scores are checked before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, cast

import numpy as np

from ..arrays import DeviceArray, Float16, Float32
from ..bundle import BundleManifest
from ..engines.contract import Batch, Engine
from ..engines.manifest import Profile
from ..errors import EdjeError
from ..kernels.device.contract import Stream
from ..kernels.device.cuda_core import CudaCoreDevice
from ..kernels.device.facts import BINDINGS, call
from ..kernels.device.measuring import gpu_arrays
from ..runtime.opening import RunOptions
from ..runtime.reranker import Reranker
from ..runtime.residency import Place, ResidencyOptions
from ..runtime.store import TokenStore
from ..runtime.store.store import Access
from ..runtime.text import QueryTokenizer
from . import gpu_contest as contest
from .gpu_ceilings import slots_of
from .gpu_engines import TorchEngine, built_engine, manifest_of
from .gpu_steps import Report
from .harness import interleave, scores_in_order
from .random_model import (
    Pairs,
    full_size_bundle,
    image_id,
    query_ids,
    query_of,
    random_tokens,
    write_store,
)

NUM_IMAGES, MAX_PAIRS, NUM_WORDPIECES = 25_000, 1024, 13
NUM_DRAWN = 2500  # records; all others are these with their values shifted
NUM_FEW, NUM_WARM, NUM_CALLS = 100, 10, 60
NUM_ROUNDS, TOP_K = 5, 10
PLACES: tuple[Place, ...] = ("disk", "host", "device")
NO_ENGINE = "no engine: what can be fed"


class RowHeads(Engine):
    """An engine that takes no time: a pair's score is the first four bytes of its tokens."""

    on_device = True

    def _enqueue(self, batch: Batch, scores: Float32, stream: Stream) -> None:
        """Copy all heads by one call of the driver: a `Device` has none with a step."""
        tokens, out = cast(DeviceArray, batch.visual_tokens), cast(DeviceArray, scores)
        driver: Any = import_module(BINDINGS)
        copy = driver.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.srcPitch = tokens.address, tokens.nbytes // len(batch)
        copy.dstDevice = out.address
        copy.dstPitch = copy.WidthInBytes = out.dtype.itemsize
        copy.Height = len(batch)
        call(driver, "cuMemcpy2DAsync", copy, stream.handle)

    def close(self) -> None:
        """Nothing to free."""


def measure_rank(report: Report) -> None:
    """Report rows (`via`: bare, or where tokens lie) and the `latencies` of a hundred candidates.

    Raises:
        EdjeError: a way gives wrong scores.
    """
    folder = full_size_bundle()
    profile = contest.profile_of([NUM_WORDPIECES], [MAX_PAIRS])
    with TemporaryDirectory(prefix="edje-rank-") as scratch:
        store, tokens = make_store(Path(scratch) / "store", BundleManifest.read(folder))
        pairs = query_pairs(folder, tokens)
        name, engine = _open_engine(folder, profile, report)
        measure_places(report, name, engine, folder, store, pairs)
        nothing = RowHeads(manifest_of(folder, "none", "0", "fp16", profile))
        exact = replace(pairs, expected=row_heads(tokens), reference="the stored bytes")
        measure_places(report, NO_ENGINE, nothing, folder, store, exact)


def make_store(
    folder: Path, bundle: BundleManifest, num_images: int = NUM_IMAGES
) -> tuple[Path, Float16]:
    """Write a store of seeded random records; return it and its tokens float16 [N, m, H]."""
    drawn = random_tokens(min(NUM_DRAWN, num_images), bundle.sizes)
    shifts = range(-(-num_images // len(drawn)))
    tokens = np.concatenate([np.roll(drawn, shift, axis=-1) for shift in shifts])[:num_images]
    write_store(folder, tokens, encoder=bundle.fingerprint_encoder).close()
    return folder, tokens


def row_heads(tokens: Float16) -> Float32:
    """Return the first four bytes of every record as float32 [N]: what `RowHeads` scores."""
    heads: Float32 = tokens.reshape(len(tokens), -1)[:, :2].copy().view(np.float32)[:, 0]
    return heads


def measure_places(
    report: Report, name: str, engine: Engine, folder: Path, store: Path, pairs: Pairs
) -> None:
    """Check the scores of every way, time all of them in turns, report a row for each."""
    query, num_images = query_of(NUM_WORDPIECES), len(pairs.tokens)
    num_batches = -(-num_images // MAX_PAIRS)
    size = num_images // num_batches
    with ExitStack() as stack:
        rerankers = {
            place: stack.enter_context(opened_reranker(engine, folder, store, place))
            for place in PLACES
        }
        gpu = stack.enter_context(gpu_arrays())
        bare = contest.bare_scores(engine, pairs, size, num_batches, gpu)
        first = np.arange(num_batches * size) % (contest.NUM_RESIDENT * size)
        compared = {contest.BARE: contest.agreement(pairs, first, bare())}
        runs: dict[str, Callable[[], object]] = {contest.BARE: bare}
        for place, reranker in rerankers.items():
            reranker.rank(query)  # warms up
            scores = scores_in_order(reranker, query)
            compared[place] = contest.agreement(pairs, np.arange(num_images), scores)
            runs[place] = partial(reranker.rank, query, top_k=TOP_K)
        timings = interleave(runs, pairs=num_images, num_rounds=NUM_ROUNDS)
        few = [image_id(number) for number in range(NUM_FEW)]
        for place, reranker in rerankers.items():
            times = call_times_ms(partial(reranker.rank, query, few, TOP_K))
            report.add("latencies", {"engine": name, "via": place, "candidates": NUM_FEW, **times})
    slots = slots_of(NUM_WORDPIECES, engine.manifest.bundle.sizes)
    facts = {"engine": f"{name}: rank", "precision": "fp16", "batch": size}
    for via, timing in timings.items():
        fault = _fault(compared[via], exactly=isinstance(engine, RowHeads))
        share = timing.pairs_per_s / timings[contest.BARE].pairs_per_s
        row = {**facts, "wordpieces": NUM_WORDPIECES, "slots": slots, **asdict(timing)}
        row |= {"via": via, "agreement": compared[via], "fault": fault}
        row |= {"pairs_per_s": None} if fault else {"share_of_bare": round(share, 4)}
        report.add("rows", row)


@contextmanager
def opened_reranker(engine: Engine, folder: Path, store: Path, place: Place) -> Iterator[Reranker]:
    """Yield a reranker with a device of its own; its end closes the engine, too."""
    access: Access = "resident" if place == "host" else "cached"
    spec = BundleManifest.read(folder).text
    with (
        closing(CudaCoreDevice()) as device,
        TokenStore.open(store, access=access) as opened,
        Reranker(
            engine,
            QueryTokenizer.open(folder, spec),
            opened,
            runs=RunOptions(device=device, residency=ResidencyOptions(place)),
        ) as reranker,
    ):
        yield reranker


def call_times_ms(call: Callable[[], object]) -> dict[str, float]:
    """Return median and least wall time of one caller's requests, warmed up."""
    times = []
    for _ in range(NUM_WARM + NUM_CALLS):
        began = perf_counter()
        call()
        times.append((perf_counter() - began) * 1e3)
    counted = times[NUM_WARM:]
    return {"p50_ms": round(median(counted), 3), "min_ms": round(min(counted), 3)}


def _fault(compared: dict[str, Any], *, exactly: bool) -> str | None:
    """Return why scores are wrong, None where they are right."""
    if exactly and compared["max_abs_diff"] != 0:
        return f"the bytes that were fed are not the stored ones: {compared}"
    return contest.agreement_fault(compared)


def query_pairs(folder: Path, tokens: Float16) -> Pairs:
    """Return the query with all images, the first of them scored in float32."""
    spec = BundleManifest.read(folder).text
    text_ids = query_ids(folder, spec, query_of(NUM_WORDPIECES))
    [pairs] = contest.scored(folder, [Pairs(NUM_WORDPIECES, text_ids, tokens)])
    return pairs


def _open_engine(folder: Path, profile: Profile, report: Report) -> tuple[str, Engine]:
    """Return TensorRT's engine where it is installed, else PyTorch's."""
    try:
        engine = built_engine(folder, "tensorrt", "fp16", profile, lambda line: None)
    except EdjeError as error:
        report.put(why_not_tensorrt=error.message)
        return "torch.compile, CUDA graphs", TorchEngine(folder, profile)
    return "tensorrt fp16", engine
