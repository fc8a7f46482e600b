"""What a shallow engine keeps of hidden states gives the whole model's scores, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from edje.bundle import BundleManifest
from edje.engines.builder.build import build_engine
from edje.engines.builder.options import EngineOptions
from edje.engines.contract import INPUTS, Batch
from edje.engines.manifest import EngineManifest
from edje.engines.native.plan import Plan
from edje.engines.native.run import NativeEngine
from edje.engines.native.weights import read_weights
from edje.engines.precision.graph import Graph
from edje.engines.precision.lower import lower_operands
from edje.engines.samples import RandomSamples
from edje.engines.shallow.cut import Head, cut
from edje.errors import EngineError
from edje.export.export import export_bundle
from edje.runtime.hidden import NUM_PARTS, SHARE_OF_FREE_BYTES
from edje.runtime.opening import RunOptions
from edje.runtime.reranker import Reranker
from edje.runtime.residency import ResidencyOptions
from edje.runtime.store import TokenStore
from edje.runtime.text import QueryTokenizer
from native_engine import EightBits, native_engine, prepared, random_batch
from official_checkpoint import Sizes, write_checkpoint
from recording_device import RecordingDevice

BUCKET = 15
ELEMENTS = {"fp16": "float16", "bf16": "bfloat16"}
NUM_PLACES = 4
MAX_PAIRS = 2  # of a batch, so that requests have several


class Kept:
    """Keeps hidden states with one engine and goes on from them with another."""

    def __init__(self, device: RecordingDevice, shape: tuple[int, int]):
        self.device, num_values = device, NUM_PLACES * shape[0] * shape[1]
        memory = device.memory(num_values, np.dtype(np.float16))
        self.states = memory.view((NUM_PLACES, *shape))
        self.stream, self._done = device.stream(), device.event()

    def score(self, engine: Any, batch: Batch, places: list[int] | None = None) -> np.ndarray:
        """Return the scores: float32 [P]."""
        held = {name: self._sent(getattr(batch, name)) for name in INPUTS}
        if places is not None:
            held["hidden"] = self.states, self._sent(np.array(places, np.int32))
        found = self.device.pinned(len(batch), np.dtype(np.float32))
        scores = self.device.mirror(found)
        engine.enqueue(Batch(**held), scores.view((len(batch),)), stream=self.stream)
        self.stream.download(found, scores, len(batch))
        self.stream.record(self._done)
        self._done.synchronize()
        assert not self.device.races, self.device.races
        return found.view((len(batch),)).copy()

    def _sent(self, array: np.ndarray) -> Any:
        pinned = self.device.pinned(array.size, array.dtype)
        target = self.device.mirror(pinned)
        pinned.view(array.shape)[...] = array
        self.stream.upload(target, pinned, array.size)
        return target.view(array.shape)


@pytest.fixture(scope="module")
def deep_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model bundle of three layers."""
    folder = tmp_path_factory.mktemp("deep")
    made = write_checkpoint(folder / "in", Sizes(hidden=48, num_layers=3))
    models = made.checkpoint, made.language_model
    export_bundle(*models, folder / "bundle", vision_model=made.vision_model)
    return folder / "bundle"


@pytest.fixture
def device(interpreted: Any) -> RecordingDevice:
    return RecordingDevice(None, kernels=interpreted)


class Builds:
    """Builds engines of a bundle's layers and opens them on a pretended device."""

    def __init__(self, bundle: Path, out: Path, like: Path, device: RecordingDevice, kernels: Any):
        self.bundle, self._device = BundleManifest.read(bundle), device
        self._graph = Graph.read(bundle / "joint_encoder.onnx")
        self._manifest = replace(EngineManifest.read(like), bundle=self.bundle)
        self._folders = EightBits(self.bundle, out, like, kernels, (BUCKET,))

    def opened(self, precision: str, layers: int | None) -> NativeEngine:
        """Return an engine of the first layers, of all where there is no number."""
        graph = self._graph
        if layers is not None:
            weight = np.random.default_rng(1).standard_normal(3 * self.bundle.sizes.hidden)
            graph = cut(graph, layers, Head(weight.astype(np.float32), 0.5))
        eight = precision == "int8"
        ready = prepared(graph, "int8") if eight else lower_operands(graph, ELEMENTS[precision])
        folder = self._folders.built(ready, precision, f"{precision}-{layers}")
        manifest = replace(self._manifest, precision=precision)
        plan = replace(Plan.read(folder), max_pairs=MAX_PAIRS)
        return NativeEngine(manifest, plan, read_weights(folder), self._device)


@pytest.fixture
def builds(
    deep_bundle: Path, tmp_path: Path, native_folder: Any, device: RecordingDevice, interpreted: Any
) -> Builds:
    return Builds(deep_bundle, tmp_path, native_folder(), device, interpreted)


@pytest.mark.parametrize(("precision", "layers"), [("fp16", 1), ("bf16", 2)])
def test_going_on_gives_the_bits_of_a_whole_forward(
    builds: Builds, device: RecordingDevice, precision: str, layers: int
) -> None:
    first, whole = builds.opened(precision, layers), builds.opened(precision, None)
    assert whole.why_not_resume(first) is None
    shape = first.hidden_shape(BUCKET)
    assert shape is not None
    assert shape == whole.hidden_shape(BUCKET)
    with device.current():
        kept, batch = Kept(device, shape), random_batch(builds.bundle, BUCKET, 3, 0)  # in two parts
        expected, plain = kept.score(whole, batch), kept.score(first, batch)
        assert kept.score(first, batch, [3, -1, 0]).tobytes() == plain.tobytes()
        kept.score(first, random_batch(builds.bundle, BUCKET, 2, 7))  # what is kept stays
        again = replace(
            batch,
            query_of_pair=batch.query_of_pair[[2, 0]],
            visual_tokens=np.full_like(batch.visual_tokens[:2], np.nan),  # nobody reads them
        )
        assert kept.score(whole, again, [0, 3]).tobytes() == expected[[2, 0]].tobytes()
        assert kept.score(whole, batch.part(slice(1, 3))).tobytes() == expected[1:].tobytes()


def test_an_engine_goes_on_from_its_own_first_layers_only(
    builds: Builds, native_folder: Any, device: RecordingDevice
) -> None:
    whole, first, eight = (
        builds.opened(*each) for each in (("fp16", None), ("fp16", 1), ("int8", 1))
    )
    assert "only a whole model goes on" in str(first.why_not_resume(whole))
    assert "element: bfloat16 and float16" in str(whole.why_not_resume(builds.opened("bf16", 1)))
    assert "8-bit layers" in str(whole.why_not_resume(eight))
    assert "8-bit layers" in str(builds.opened("int8", None).why_not_resume(eight))
    other = native_engine(native_folder(), device, text_buckets=(BUCKET,))
    assert other.why_not_resume(first) is not None
    assert whole.hidden_shape(BUCKET) is None
    shape = first.hidden_shape(BUCKET)
    assert shape is not None
    with device.current():
        kept, batch = Kept(device, shape), random_batch(builds.bundle, BUCKET, 2, 0)
        with pytest.raises(EngineError) as raised:
            kept.score(whole, batch, [0, 1])
    assert raised.value.faults == (
        "hidden: this engine neither keeps hidden states nor goes on from some",
    )


class RealSamples(RandomSamples):
    """Random pairs that pass for real ones."""

    random = False
    build_options = MappingProxyType({"calibration_store": "s", "calibration_queries": "q.txt"})


@pytest.fixture(scope="module")
def folders(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Engines of one layer of two, and of both."""
    folder = tmp_path_factory.mktemp("cascade")
    pairs = RealSamples(BundleManifest.read(tiny_bundle), 4, 12)
    for layers in (1, None):
        build_engine(
            tiny_bundle,
            folder / f"{layers}",
            backend="native",
            precision="fp16",
            calibration=pairs,
            options=EngineOptions(layers=layers, max_pairs=MAX_PAIRS, text_buckets=(BUCKET,)),
        )
    return [folder / "1", folder / "None"]


def opened_cascade(
    device: RecordingDevice,
    folders: list[Path],
    store: TokenStore,
    num_places: int,
    residency: ResidencyOptions,
) -> Reranker:
    """Open two native engines on a pretended device with room for `num_places` pairs."""
    engines = [native_engine(folder, device, max_pairs=MAX_PAIRS) for folder in folders]
    shape, spare = engines[0].hidden_shape(BUCKET), sum(each.bytes_a_stream for each in engines)
    assert shape is not None
    wanted = num_places * shape[0] * shape[1] * 2 * NUM_PARTS / SHARE_OF_FREE_BYTES
    device.free_bytes = lambda: spare + int(wanted)  # type: ignore[method-assign]
    return Reranker(
        engines[0],
        QueryTokenizer.open(folders[0], engines[0].manifest.bundle.text),
        store,
        rescore=engines[1],
        runs=RunOptions(device, residency=residency),
    )


@pytest.fixture
def store(tiny_store: Path) -> Iterator[TokenStore]:
    with TokenStore.open(tiny_store) as opened:
        yield opened


@pytest.mark.parametrize(
    ("num_places", "num_images", "seed", "least", "most", "residency"),
    [
        (20, 5, 3, 5, 5, ResidencyOptions("device", max_bytes=1 << 20)),
        (8, 10, None, 4, 8, ResidencyOptions()),
        (7, 3, None, 0, 0, ResidencyOptions()),
    ],
)
def test_survivors_go_on_as_far_as_memory_allows(
    folders: list[Path],
    interpreted: Any,
    store: TokenStore,
    num_places: int,
    num_images: int,
    seed: int | None,
    least: int,
    most: int,
    residency: ResidencyOptions,
) -> None:
    device = RecordingDevice(seed, kernels=interpreted)
    ids = list(store.ids())[:num_images]
    with opened_cascade(device, folders, store, num_places, residency) as reranker:
        ranked = reranker.rank("a red kite", ids, top_k=2)
        whole = reranker.rank("a red kite", ids)  # all of them by the whole model alone
    assert not device.races, device.races
    assert ranked.rescoring is not None
    assert ranked.rescoring.num_rescored == num_images
    assert least <= ranked.rescoring.num_resumed <= most
    assert [(hit.id, hit.score) for hit in ranked] == [(hit.id, hit.score) for hit in whole][:2]
