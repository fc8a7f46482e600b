"""A reranker ranks the same wherever its tokens are, and says where they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.engines.contract import Engine
from edje.errors import EngineError, RequestError, StoreError
from edje.kernels.device import open_device
from edje.kernels.device.host import HostDevice
from edje.runtime.opening import RunOptions
from edje.runtime.pipeline import Request
from edje.runtime.reranker import Reranker
from edje.runtime.residency import ResidencyOptions, Stages, choose, speeds_of
from edje.runtime.store import TokenStore
from recording_device import RecordingDevice, WatchedEngine
from toy_engine import HIDDEN, NUM_TOKENS, ToyEngine, toy_manifest, toy_store, toy_tokenizer

NUM_IMAGES = 40
RECORD_BYTES = NUM_TOKENS * HIDDEN * 2
IDS = [f"img-{number}" for number in range(NUM_IMAGES)]


@pytest.fixture(params=["float16", "int8"])
def store_path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    values = np.arange(NUM_IMAGES) * 7 % 23
    toy_store(tmp_path / "store", values, dtype=request.param).close()
    return tmp_path / "store"


@pytest.fixture
def store(store_path: Path) -> Iterator[TokenStore]:
    with TokenStore.open(store_path) as store:
        yield store


@pytest.fixture(params=[False, True], ids=["float16 engine", "engine of the store's dtype"])
def engine(request: pytest.FixtureRequest, store: TokenStore) -> Engine:
    dtype = store.layout.dtype if request.param else "float16"
    return WatchedEngine(replace(toy_manifest(), token_dtype=dtype))


def on(device: RecordingDevice, residency: ResidencyOptions) -> RunOptions:
    return RunOptions(device=device, residency=residency)


class Opened:
    """A reranker on a recording device, and one on the host for comparison."""

    def __init__(self, tmp_path: Path, engine: Engine, store: TokenStore, **wish: Any):
        tokenizer = toy_tokenizer(tmp_path)
        self.device = RecordingDevice(7)
        self.reranker = Reranker(
            engine, tokenizer, store, runs=on(self.device, ResidencyOptions("device", **wish))
        )
        self.plain = Reranker(ToyEngine(engine.manifest), tokenizer, store)
        self.reads: list[int] = []
        read = store.read

        def counting_read(rows: Any, *arguments: Any, **named: Any) -> Any:
            self.reads.append(len(rows))
            return read(rows, *arguments, **named)

        store.read = counting_read  # type: ignore[method-assign]

    def compare(self, candidates: list[str] | None) -> None:
        for query in ("a red circle", "blue"):
            got = self.reranker.rank(query, candidates, 10)
            assert got.hits == self.plain.rank(query, candidates, 10).hits
            assert got.engine.residency == "device"
            assert got.engine.device == "recording"

    def num_read(self, candidates: list[str] | None = None) -> int:
        self.reads.clear()
        self.reranker.rank("red", candidates)
        return sum(self.reads)

    def close(self) -> None:
        self.plain.close()
        self.reranker.close()
        assert self.device.races == []
        assert not self.device.closed, "it is the caller's"


def test_a_store_that_fits_lies_on_the_device_whole(tmp_path, engine, store):
    opened = Opened(tmp_path, engine, store)
    found = opened.reranker.residency
    assert (found.place, found.policy, found.num_images) == ("device", "all", NUM_IMAGES)
    assert found.num_bytes == NUM_IMAGES * (
        RECORD_BYTES if engine.manifest.token_dtype == "float16" else NUM_TOKENS * (HIDDEN + 2)
    )
    assert "every image" in found.reason
    opened.compare(None)
    opened.compare(IDS[5:30])
    assert opened.num_read() == 0
    opened.close()


def test_hits_and_misses_of_every_batch_are_told(tmp_path, engine, store):
    opened = Opened(tmp_path, engine, store, max_bytes=20 * RECORD_BYTES)
    counts = []
    for asked in (IDS[:12], IDS[:12], IDS[6:18], [IDS[3]] * 5):
        queries, alone = opened.reranker.tokenizer(["red"]), np.zeros(len(asked), np.int64)
        request = Request(queries, alone, store.rows(asked))
        scored = opened.reranker.score(request)
        counts.append((scored.num_hits, scored.num_misses))
    assert counts == [(0, 12), (12, 0), (6, 6), (5, 0)]
    scored = opened.plain.score(request)
    assert (scored.num_hits, scored.num_misses) == (0, 0), "nothing is held, so nothing can hit"
    opened.close()


def test_of_a_larger_store_what_was_asked_for_last_stays(tmp_path, engine, store):
    opened = Opened(tmp_path, engine, store, max_bytes=20 * RECORD_BYTES)
    found = opened.reranker.residency
    assert (found.place, found.policy) == ("device", "recent")
    assert found.num_images >= 20
    opened.compare(IDS)
    opened.compare(IDS[:12])
    assert opened.num_read(IDS[:12]) == 0
    opened.close()


def test_a_given_list_stays_and_nothing_else_comes_in(tmp_path, engine, store):
    opened = Opened(tmp_path, engine, store, ids=["img-3", "img-9", "img-3", "img-30"])
    found = opened.reranker.residency
    assert (found.policy, found.num_images) == ("listed", 3)
    opened.compare(IDS)
    assert opened.num_read(["img-3", "img-9", "img-30"]) == 0
    assert opened.num_read(IDS[:10]) == 8
    assert opened.num_read(IDS[:10]) == 8
    opened.close()


def test_two_engines_share_what_is_held(tmp_path, store):
    dtype = store.layout.dtype
    engines = [WatchedEngine(replace(toy_manifest(), token_dtype=dtype)) for _ in range(2)]
    device = RecordingDevice(1)
    read, reads = store.read, []
    store.read = lambda rows, *more, **named: reads.extend(rows) or read(rows, *more, **named)
    with Reranker(
        engines[0],
        toy_tokenizer(tmp_path),
        store,
        rescore=engines[1],
        rescore_margin=0.1,
        runs=on(device, ResidencyOptions("device")),
    ) as reranker:
        assert [hit.score for hit in reranker.rank("red", IDS, 3)] == sorted(
            (hit.score for hit in reranker.rank("red", IDS)), reverse=True
        )[:3]
        assert sorted(reads) == store.live_rows().tolist(), "each record is read and held once"
    assert device.races == []


def test_auto_measures_and_says_what_it_chose(tmp_path, engine, store):
    device = RecordingDevice(3)
    with Reranker(
        engine, toy_tokenizer(tmp_path), store, runs=on(device, ResidencyOptions("auto"))
    ) as reranker:
        made = device.usage()
        found = reranker.residency
        assert found.place == choose(found.pairs_per_s)
        assert found.pairs_per_s.keys() == {"disk", "host", "device"}
        assert found.reason.startswith("measured pairs/s: disk ")
        reranker.rank("red", IDS)
        assert device.usage() == made
    assert device.races == []


def test_auto_on_a_cpu_measures_disk_and_memory(tiny_engine, tiny_store):
    with Reranker.open(tiny_engine, store=tiny_store, residency="auto") as reranker:
        found = reranker.residency
        assert found.pairs_per_s.keys() == {"disk", "host"}
        assert found.place in ("disk", "host")
        assert "not device: the device host has no memory of its own" in found.reason
        result = reranker.rank("a red circle")
        assert result.engine.residency == found.place
        assert len(result) == 12


def test_host_loads_the_store(tiny_engine, tiny_store):
    with Reranker.open(tiny_engine, store=tiny_store) as reranker:
        expected = reranker.rank("a red circle").hits
        assert reranker.residency.place == "disk"
        assert reranker.residency.num_bytes == 0
    with Reranker.open(tiny_engine, store=tiny_store, residency="host") as reranker:
        assert reranker.rank("a red circle").hits == expected
        assert reranker.residency.place == "host"
        assert reranker.residency.num_images == 12


def test_a_callers_store_is_loaded_where_that_is_asked_and_stays_open(tiny_engine, tiny_store):
    with TokenStore.open(tiny_store) as store:
        with Reranker.open(tiny_engine, store=store, residency="host") as reranker:
            expected = reranker.rank("a red circle").hits
            assert (store.access, reranker.residency.place) == ("resident", "host")
        with Reranker.open(tiny_engine, store=store) as reranker:
            assert reranker.residency.place == "host", "it stays in memory"
            assert reranker.rank("a red circle").hits == expected
        assert len(store.ids()) == 12
        with pytest.raises(RequestError, match='"disk", but the open store is held in memory'):
            Reranker.open(tiny_engine, store=store, residency="disk")


def test_a_store_open_for_changes_is_never_loaded(tmp_path, store_path):
    with TokenStore.open(store_path, mode="a") as store:
        wanted = RunOptions(residency=ResidencyOptions("auto"))
        with Reranker(ToyEngine(), toy_tokenizer(tmp_path), store, runs=wanted) as reranker:
            assert reranker.residency.pairs_per_s.keys() == {"disk"}
        wanted = RunOptions(residency=ResidencyOptions("host"))
        with pytest.raises(StoreError, match="is open for changes"):
            Reranker(ToyEngine(), toy_tokenizer(tmp_path), store, runs=wanted)


def test_auto_loads_the_store_where_that_is_faster(tiny_engine, tiny_store, monkeypatch):
    speeds = {"disk": 100.0, "host": 200.0}
    monkeypatch.setattr("edje.runtime.residency.Trial.measure", lambda self: (speeds, {}))
    with Reranker.open(tiny_engine, store=tiny_store, residency="auto") as reranker:
        assert reranker.residency.place == "host"
        assert len(reranker.rank("red")) == 12


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({"disk": 100.0, "host": 104.0, "device": 104.9}, "disk"),
        ({"disk": 90.0, "host": 100.0, "device": 101.0}, "host"),
        ({"disk": 90.0, "host": 100.0, "device": 120.0}, "device"),
        ({"host": 100.0, "device": 90.0}, "host"),
    ],
)
def test_the_cheapest_place_that_keeps_up_is_chosen(speeds, chosen):
    assert choose(speeds) == chosen


def test_the_slowest_stage_decides_and_disk_and_host_compute_the_same():
    stages = {
        "disk": Stages(gather=4.0, copy=1.0, compute=2.0),
        "host": Stages(gather=0.5, copy=1.0, compute=2.6),
        "device": Stages(gather=0.01, copy=0.0, compute=2.5),
    }
    assert speeds_of(stages, 100) == pytest.approx(
        {"disk": 25_000.0, "host": 50_000.0, "device": 40_000.0}
    )


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (
            ResidencyOptions("device", max_bytes=3),
            r"1 images of \d+ bytes need \d+ bytes on recording",
        ),
        (ResidencyOptions("device", ids=["img-1", "nobody"]), r"1 of 2 ids are not in the store"),
    ],
)
def test_wishes_that_cannot_be_granted(tmp_path, store, wish, says):
    with pytest.raises(RequestError, match=says):
        Reranker(ToyEngine(), toy_tokenizer(tmp_path), store, runs=on(RecordingDevice(1), wish))


def test_the_host_keeps_nothing_on_a_device(tiny_engine, tiny_store):
    with pytest.raises(EngineError, match=r"no memory of its own(?s:.*)the residency `host`"):
        Reranker.open(tiny_engine, store=tiny_store, residency="device")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cuda", "no device is called 'cuda', expected host, cuda_core"),
        ("cuda_core:one", "no device is called 'cuda_core:one'"),
        ("host:1", "no device is called 'host:1'"),
        ("cuda_core", "built for the CPU, it cannot run on the device cuda_core"),
    ],
)
def test_devices_that_do_not_fit(tiny_engine, tiny_store, name, says):
    with pytest.raises(EngineError, match=says):
        Reranker.open(tiny_engine, store=tiny_store, device=name)


def test_a_gpu_engine_asks_for_a_gpu():
    with pytest.raises(EngineError, match="built for a GPU, it cannot run on the device host"):
        open_device("host", "cuda")


@pytest.mark.parametrize("lost", [False, True])
def test_engines_are_closed_where_their_device_is_current_or_lost(tmp_path, store, lost):
    device, engine, depths = RecordingDevice(1), WatchedEngine(), []
    engine.close = lambda: depths.append(device.depth())
    reranker = Reranker(
        engine, toy_tokenizer(tmp_path), store, runs=on(device, ResidencyOptions("disk"))
    )
    if lost:

        def refuse() -> None:
            raise RuntimeError("an illegal memory access was encountered")

        device.current = refuse
    reranker.close()
    assert depths == [0 if lost else 1]


def test_a_callers_device_stays_open(tiny_engine, tiny_store):
    device = HostDevice()
    mine = device.stream()
    with Reranker.open(tiny_engine, store=tiny_store, device=device, stream=mine) as reranker:
        assert len(reranker.rank("red")) == 12
        assert device.usage().num_streams == 1
    device.close()


def test_after_a_warm_up_every_bucket_has_run(tmp_path, store):
    engine = ToyEngine()
    with Reranker(engine, toy_tokenizer(tmp_path), store) as reranker:
        reranker.warm_up()
    profile = engine.manifest.profile
    assert {bucket for _, bucket in engine.batches} == set(profile.text_buckets)
    assert {size for size, _ in engine.batches} == {profile.max_pairs}


def test_a_warm_up_for_one_query_scores_one_image_of_its_length(tmp_path, store):
    engine = ToyEngine()
    with Reranker(engine, toy_tokenizer(tmp_path), store) as reranker:
        reranker.warm_up("red")
        (warm,) = engine.batches
        reranker.rank("red", IDS)
        with pytest.raises(RequestError, match="empty"):
            reranker.warm_up(" ")
    (_, bucket), *_ = engine.batches[1:]
    assert warm == (1, bucket)
