"""Cascades behind the service: the hits of `Reranker.rank`, in batches that requests share."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np

from edje.runtime.reranker import Reranker
from edje.runtime.server import ScoringService
from toy_engine import (
    FastEngine,
    ToyEngine,
    fast_manifest,
    precise_manifest,
    toy_manifest,
    toy_store,
    toy_tokenizer,
)

NUM_IMAGES = 60
PROFILE = toy_manifest(max_pairs=64).profile
QUERIES = ["red", "a blue circle", "square " * 20]


@contextmanager
def cascade_service(
    tmp_path: Path, before: object = None
) -> Iterator[tuple[ScoringService, FastEngine, ToyEngine]]:
    fast = FastEngine(fast_manifest(profile=PROFILE))
    precise = ToyEngine(precise_manifest(profile=PROFILE), before)
    precise.running = fast.running  # the engine asserts that nobody else computes
    with toy_store(tmp_path / "store", np.arange(NUM_IMAGES) // 3) as store:
        reranker = Reranker(fast, toy_tokenizer(tmp_path), store, rescore=precise)
        with ScoringService(reranker) as service:
            yield service, fast, precise
        reranker.close()


def test_many_callers_get_what_rank_returns(tmp_path):
    with cascade_service(tmp_path) as (service, _, _):
        ids = list(service.reranker.store.ids())

        def ask(number: int) -> bool:
            random = Random(number)
            query, top_n = random.choice(QUERIES), random.choice([1, 3, 10, None])
            some = random.sample(ids, random.randint(1, NUM_IMAGES))
            expected = service.reranker.rank(query, some, top_n)
            found = service.submit(query, some, top_n=top_n).result(20)
            assert found.hits == expected.hits
            assert found.engine == expected.engine
            assert (found.rescoring is None) == (expected.rescoring is None)
            if found.rescoring is not None and expected.rescoring is not None:
                assert found.rescoring.num_rescored == expected.rescoring.num_rescored
                assert found.rescoring.chosen == expected.rescoring.chosen
            return True

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(ask, range(80)))


def test_survivors_of_several_requests_are_rescored_in_one_batch(tmp_path):
    reached, opened = threading.Semaphore(0), threading.Event()

    def gate(_: object) -> None:
        reached.release()
        assert opened.wait(20)

    with cascade_service(tmp_path, gate) as (service, fast, precise):
        ids = list(service.reranker.store.ids())
        held = []
        for _ in range(2):  # one batch a thread
            held.append(service.submit("red", ids[:2]))
            while service.load().num_pairs:
                time.sleep(0.001)
        assert reached.acquire(timeout=10)
        asked = [service.submit("red", ids[n : n + 10], top_n=2) for n in range(0, 60, 10)]
        opened.set()
        answers = [future.result(20) for future in asked]
        [future.result(20) for future in held]
        assert [size for size, _ in fast.batches] == [60]
        again = [answer.rescoring.num_rescored for answer in answers if answer.rescoring]
        sizes = [size for size, _ in precise.batches[2:]]
        assert sum(sizes) == sum(again)
        assert sizes[0] >= 6 * 2  # everybody's first round
        assert len(sizes) < len(asked)


def test_a_cancelled_request_leaves_between_its_steps(tmp_path):
    started, go_on = threading.Event(), threading.Event()

    def gate(_: object) -> None:
        started.set()
        assert go_on.wait(20)

    with cascade_service(tmp_path, gate) as (service, *_):
        ids = list(service.reranker.store.ids())
        blocker = service.submit("red", ids[:2])
        assert started.wait(10)
        left = service.submit("red", ids, top_n=2)
        left.cancel()
        go_on.set()
        blocker.result(20)
        stays = service.submit("red", ids, top_n=2).result(20)
        assert stays.hits == service.reranker.rank("red", ids, 2).hits
        assert service.load().num_pairs == 0
