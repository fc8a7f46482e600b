"""Native engines on a pretended GPU whose kernels run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edje.bundle import INPUTS, BundleManifest
from edje.engines.build_options import BuildOptions
from edje.engines.contract import Batch, BuildJob, OpenOptions
from edje.engines.manifest import EngineManifest, Profile
from edje.engines.native import backend
from edje.engines.native.plan import Plan
from edje.engines.native.run import NativeEngine
from edje.engines.native.weights import read_weights
from edje.engines.precision.dynamic import quantize_dynamic
from edje.engines.precision.graph import Graph
from edje.engines.precision.lower import lower_operands
from recording_device import RecordingDevice


def native_engine(folder: Path, device: RecordingDevice, **changed: Any) -> NativeEngine:
    """Open an engine folder on a device; `changed` are fields of its plan."""
    plan = replace(Plan.read(folder), **changed)
    return NativeEngine(EngineManifest.read(folder), plan, read_weights(folder), device)


@contextmanager
def native_scorer(
    folder: Path, kernels: Any, *, capability: tuple[int, int] = (9, 0), **changed: Any
) -> Iterator[HostScorer]:
    """Open an engine folder on a device of its own, which does everything at once, in order."""
    device = RecordingDevice(None, kernels=kernels)
    device.compute_capability = capability
    engine = native_engine(folder, device, **changed)
    with device.current():
        yield HostScorer(engine, device)
        engine.close()


class HostScorer:
    """Scores batches of host arrays; everything goes through one stream."""

    def __init__(self, engine: NativeEngine, device: RecordingDevice):
        self.engine, self.device = engine, device
        self.stream, self._done = device.stream(), device.event()

    def __call__(self, batch: Batch) -> np.ndarray:
        """Return the scores: float32 [P]."""
        held = {name: self._sent(getattr(batch, name)) for name in (*INPUTS, "visual_scales")}
        found = self.device.pinned(len(batch), np.dtype(np.float32))
        scores = self.device.mirror(found)
        self.engine.enqueue(Batch(**held), scores.view((len(batch),)), stream=self.stream)
        self.stream.download(found, scores, len(batch))
        self.stream.record(self._done)
        self._done.synchronize()
        assert not self.device.races, self.device.races
        return found.view((len(batch),)).copy()

    def _sent(self, array: np.ndarray | None) -> Any:
        if array is None:
            return None
        pinned = self.device.pinned(array.size, array.dtype)
        target = self.device.mirror(pinned)
        pinned.view(array.shape)[...] = array
        self.stream.upload(target, pinned, array.size)
        return target.view(array.shape)


def random_batch(bundle: BundleManifest, bucket: int, num_pairs: int, seed: int) -> Batch:
    """Return pairs of up to three queries of any length that the bucket takes."""
    rng, sizes = np.random.default_rng(seed), bundle.sizes
    num_queries = int(rng.integers(1, 4))
    lengths = rng.integers(2, bucket + 1, num_queries).astype(np.int32)
    ids = rng.integers(1, sizes.vocab_size, (num_queries, bucket)).astype(np.int32)
    ids[np.arange(bucket) >= lengths[:, None]] = 0
    shape = num_pairs, sizes.num_tokens, sizes.hidden
    tokens = rng.standard_normal(shape, np.float32).astype(np.float16)
    return Batch(ids, lengths, rng.integers(0, num_queries, num_pairs).astype(np.int32), tokens)


def ranked_batches(bundle: BundleManifest, num_pairs: int) -> list[Batch]:
    """Return pairs to rank, as many of every bucket, of several queries each."""
    whole = (random_batch(bundle, bucket, 17, bucket) for bucket in BUCKETS)
    return [batch.part(slice(num_pairs)) for batch in whole]


BUCKETS = (15, 23, 31, 47, 63)
EIGHT_BIT_BUCKETS = (15, 63)


class EightBits:
    """Builds engines of prepared graphs, and opens them on pretended GPUs."""

    def __init__(
        self,
        bundle: BundleManifest,
        folder: Path,
        like: Path,
        interpreted: Any,
        buckets: tuple[int, ...] = EIGHT_BIT_BUCKETS,
    ):
        """Build into `folder`; manifests are like that of the engine folder `like`."""
        self._bundle, self._folder, self._interpreted = bundle, folder, interpreted
        self._buckets = buckets
        self._manifest = replace(EngineManifest.read(like), bundle=bundle)

    def built(self, graph: Graph, precision: str, name: str) -> Path:
        """Build a prepared graph; return the folder."""
        out = self._folder / name
        out.mkdir()
        path = out / "graph.onnx"
        graph.write(path)
        profile, options = Profile(64, self._buckets), BuildOptions(report=True)
        job = BuildJob(
            path, out, precision, "float16", profile, self._bundle, options, lambda _: None
        )
        backend.build(job)
        return out

    def on_gpu(self, folder: Path, precision: str) -> NativeEngine:
        """Open an engine on the real card."""
        manifest = replace(self._manifest, precision=precision)
        return backend.load(folder, manifest, OpenOptions())

    def scorer(
        self, folder: Path, precision: str, capability: tuple[int, int], max_pairs: int = 4
    ) -> Any:
        """Return what scores host batches on a device of this compute capability."""
        device = RecordingDevice(None, kernels=self._interpreted)
        device.compute_capability = capability
        plan = replace(Plan.read(folder), max_pairs=max_pairs)
        manifest = replace(self._manifest, precision=precision)
        return HostScorer(NativeEngine(manifest, plan, read_weights(folder), device), device)


def prepared(graph: Graph, kind: str, keep: tuple[str, ...] = ()) -> Graph:
    """Return a bundle's graph as builds of 8-bit engines get it, nothing smoothed."""
    never = backend.NEVER_QUANTIZED
    return lower_operands(quantize_dynamic(graph, kind, keep=keep, never=never), "float16")
