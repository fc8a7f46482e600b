"""A native engine behind the pipeline: what a batch costs, and every order a GPU may finish in."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.runtime.pipeline import Pipeline, Request
from edje.runtime.pool import TokenPool
from edje.runtime.store import TokenStore
from edje.runtime.text import TokenizedQueries
from native_engine import native_engine
from recording_device import RecordingDevice

MAX_PAIRS = 4


@contextmanager
def pipeline_on(
    device: RecordingDevice, folder: Path, store: Path, *, num_resident: int = 0
) -> Iterator[tuple[Pipeline, np.ndarray]]:
    """Yield a warm pipeline, and the rows of the store."""
    engine = native_engine(folder, device, max_pairs=MAX_PAIRS, text_buckets=(15, 23))
    with TokenStore.open(store) as tokens, device.current():
        rows = tokens.live_rows()
        sizes = engine.manifest.bundle.sizes
        shape = sizes.num_tokens, sizes.hidden
        pool = None
        if num_resident:
            more = {"shape": shape, "dtype": "float16", "checks_finite": False}
            pool = TokenPool(device, rows, num_resident, **more)
        pipeline = Pipeline(engine, tokens, device, pool=pool)
        if pool is not None:
            pipeline.load(rows[:num_resident])
            pool.map.freeze()
        yield pipeline, rows
        pipeline.close()
        engine.close()


def request_of(rows: np.ndarray, lengths: list[int], seed: int = 0) -> Request:
    """Return a request for these rows by queries of these lengths, in turn."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 100, (len(lengths), max(lengths))).astype(np.int32)
    ids[np.arange(ids.shape[1]) >= np.array(lengths)[:, None]] = 0
    queries = TokenizedQueries(ids, np.array(lengths, np.int32), np.zeros(len(lengths), np.bool_))
    return Request(queries, np.arange(len(rows)) % len(lengths), rows)


@pytest.mark.parametrize("num_resident", [0, 2, 8])
def test_a_batch_is_one_assemble_and_one_graph(
    native_folder: Any, tiny_store: Path, interpreted: Any, num_resident: int
) -> None:
    """Also where tokens are resident, all or some: they are read where they lie."""
    device = RecordingDevice(None, kernels=interpreted)
    more = {"num_resident": num_resident}
    with pipeline_on(device, native_folder(), tiny_store, **more) as (pipeline, rows):
        pipeline.run(request_of(rows[:3], [9]))  # whoever comes first makes the graphs
        before, num_launches = device.usage(), len(device.launches)
        num_graphs = device.num_graph_launches
        for count in (1, 2, 3, 4):
            pipeline.run(request_of(rows[:count], [9]))
        assert [launch.symbol for launch in device.launches[num_launches:]] == ["assemble"] * 4
        assert device.num_graph_launches - num_graphs == 4
        assert device.usage() == before  # nothing is allocated while requests run
        assert not device.races, device.races


@pytest.mark.parametrize(("seed", "num_resident"), [(0, 0), (1, 0), (2, 8), (3, 3)])
def test_any_order_of_a_gpus_work_gives_the_same_scores(
    native_folder: Any, tiny_store: Path, interpreted: Any, seed: int, num_resident: int
) -> None:
    folder = native_folder()
    requests = [([9, 20], 0), ([15], 1), ([3], 2)]

    def scores_on(device: RecordingDevice, num_threads: int, num_resident: int) -> list[bytes]:
        more = {"num_resident": num_resident}
        with pipeline_on(device, folder, tiny_store, **more) as (pipeline, rows):

            def score(asked: tuple[list[int], int]) -> bytes:
                lengths, number = asked
                request = request_of(rows[number : number + 5], lengths, number)
                return pipeline.run(request).scores.tobytes()

            with ThreadPoolExecutor(num_threads) as threads:
                found = list(threads.map(score, requests))
        assert not device.races, device.races
        return found

    in_order = scores_on(RecordingDevice(None, kernels=interpreted), 1, 0)
    assert scores_on(RecordingDevice(seed, kernels=interpreted), 3, num_resident) == in_order
