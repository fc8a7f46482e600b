"""`ScoringService`: the scores of `Reranker.rank`, whoever else's pairs were in the batch."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from math import inf

import numpy as np
import pytest

from edje.errors import EngineError, RequestError, StoppedError
from edje.runtime.reranker import Reranker
from edje.runtime.server import (
    OverloadedError,
    ScoringService,
    ServiceOptions,
    UnknownIdsError,
)
from toy_engine import ToyEngine, toy_manifest, toy_store, toy_tokenizer
from waiting import wait_until

IDS = [f"img-{number}" for number in range(12)]
QUERIES = ["red", "a blue circle", "circle above a red square", "square " * 20]


class Gate:
    """Holds the engine before each batch until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Semaphore(0), threading.Event()

    def __call__(self, batch: object) -> None:
        self.reached.release()
        assert self.open.wait(20)


def wait_until_taken(service: ScoringService) -> None:
    """Wait until batches hold all that was submitted."""
    wait_until(lambda: not service.load().num_pairs)


@contextmanager
def toy_service(tmp_path, engine: ToyEngine, **options) -> Iterator[ScoringService]:
    with toy_store(tmp_path / "store", np.linspace(-2, 2, 40)) as store:
        reranker = Reranker(engine, toy_tokenizer(tmp_path), store)
        with ScoringService(reranker, ServiceOptions(**options)) as service:
            yield service
        reranker.close()


@pytest.fixture
def service(tmp_path) -> Iterator[ScoringService]:
    with toy_service(tmp_path, ToyEngine(toy_manifest(max_pairs=16))) as opened:
        yield opened


def ids_of(service: ScoringService) -> list[str]:
    return list(service.reranker.store.ids())


def test_an_answer_is_what_rank_returns(service):
    ids = ids_of(service)
    for query in QUERIES[:3]:
        expected = service.reranker.rank(query, ids, 5)
        answer = service.submit(query, ids, top_n=5).result(10)
        assert [(hit.id, hit.index) for hit in answer.hits] == [
            (hit.id, hit.index) for hit in expected
        ]
        assert [hit.score for hit in answer.hits] == [hit.score for hit in expected]
        assert answer.num_asked == len(ids)
        assert answer.stages.total > 0


def test_two_queries_in_one_batch_are_never_mixed(tmp_path):
    """40 threads, four queries, every score known: each gets its own."""
    with toy_service(tmp_path, ToyEngine(toy_manifest(max_pairs=16))) as service:
        ids = ids_of(service)
        expected = {
            query: {hit.id: hit.score for hit in service.reranker.rank(query, ids)}
            for query in QUERIES
        }
        start = threading.Barrier(40)

        def ask(number: int) -> bool:
            start.wait(20)
            query = QUERIES[number % len(QUERIES)]
            some = ids[number % 7 :: 1 + number % 3]
            answer = service.submit(query, some).result(20)
            return {hit.id: hit.score for hit in answer.hits} == {
                name: expected[query][name] for name in some
            }

        with ThreadPoolExecutor(40) as pool:
            assert all(pool.map(ask, range(40)))


def test_requests_that_wait_together_share_a_batch(tmp_path):
    gate = Gate()
    engine = ToyEngine(toy_manifest(max_pairs=16), before=gate)
    with toy_service(tmp_path, engine) as service:
        ids = ids_of(service)
        first = []
        for _ in range(2):  # one batch a thread
            first.append(service.submit("red", ids[:16]))
            wait_until_taken(service)
        assert gate.reached.acquire(timeout=10)
        wait_until_taken(service)
        rest = [service.submit("red", ids[n : n + 2]) for n in range(8)]
        gate.open.set()
        for future in first + rest:
            future.result(10)
        assert sorted(size for size, _ in engine.batches) == [16, 16, 16]


def test_rows_are_candidates_as_good_as_ids(service):
    ids = ids_of(service)
    rows = service.reranker.store.rows(ids)
    by_id = service.submit("red", ids).result(10)
    by_row = service.submit("red", rows).result(10)
    assert by_row.order.tolist() == by_id.order.tolist()
    assert by_row.logits.tolist() == by_id.logits.tolist()
    with pytest.raises(UnknownIdsError, match="1 id is not in the store"):
        service.submit("red", np.append(rows, 1 << 60))


def test_duplicates_get_equal_scores_in_the_order_given(service):
    first, second = ids_of(service)[:2]
    answer = service.submit("red", [first, second, first]).result(10)
    scores = {hit.index: hit.score for hit in answer.hits}
    assert scores[0] == scores[2]
    assert answer.order.tolist().index(0) < answer.order.tolist().index(2)


@pytest.mark.parametrize(
    ("unknown", "ranked", "missing"), [("skip", 1, 2), ("lowest", 3, 2), ("error", None, None)]
)
def test_ids_that_the_store_lacks(service, unknown, ranked, missing):
    known = ids_of(service)[0]
    asked = ["what is this", known, "an English sentence"]
    if ranked is None:
        with pytest.raises(UnknownIdsError) as refused:
            service.submit("red", asked, unknown=unknown)
        assert refused.value.missing == [(0, asked[0]), (2, asked[2])]
        return
    answer = service.submit("red", asked, unknown=unknown).result(10)
    assert answer.order[0] == 1
    assert len(answer.order) == ranked
    assert [fault.id for fault in answer.missing] == [asked[0], asked[2]]
    assert np.isneginf(answer.logits[1:]).all()


def test_only_unknown_ids_need_no_engine(service):
    assert service.submit("red", ["no", "nope"], unknown="lowest").result(1).order.tolist() == [
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"query": ""}, "empty"),
        ({"query": 5}, "query"),
        ({"candidates": []}, "no candidates"),
        ({"candidates": "img"}, "candidates"),
        ({"candidates": [1]}, "not strings"),
        ({"candidates": np.zeros(2, np.int32)}, "int64"),
        ({"top_n": 0}, "top_n"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"unknown": "guess"}, "unknown"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(service, change, fault):
    given = {"query": "red", "candidates": ids_of(service)[:2], **change}
    with pytest.raises(RequestError, match=fault):
        service.submit(given.pop("query"), given.pop("candidates"), **given)


def test_a_deadline_drops_what_no_batch_holds(tmp_path):
    gate = Gate()
    engine = ToyEngine(toy_manifest(max_pairs=4), before=gate)
    with toy_service(tmp_path, engine) as service:
        ids = ids_of(service)
        held = []
        for _ in range(2):  # one batch a thread
            held.append(service.submit("red", ids[:4]))
            wait_until_taken(service)
        late = service.submit("red", ids, timeout_s=0.05)
        gate.reached.acquire(timeout=10)
        time.sleep(0.1)
        gate.open.set()
        with pytest.raises(StoppedError, match="deadline passed"):
            late.result(10)
        for future in held:
            future.result(10)
        assert service.worker.num_dropped == len(ids)
        assert len(engine.batches) == 2


def test_a_cancelled_request_costs_nothing_more(tmp_path):
    gate = Gate()
    engine = ToyEngine(toy_manifest(max_pairs=4), before=gate)
    with toy_service(tmp_path, engine) as service:
        ids = ids_of(service)
        held = []
        for _ in range(2):  # one batch a thread
            held.append(service.submit("red", ids[:4]))
            wait_until_taken(service)
        gone = service.submit("red", ids)
        assert gone.cancel()
        gate.open.set()
        for future in held:
            future.result(10)
        with pytest.raises(CancelledError):
            gone.result(1)
        assert service.worker.num_dropped == len(ids)
        assert service.load().num_requests == 0


def test_too_much_waiting_is_refused_with_the_time_to_come_back(tmp_path):
    engine = ToyEngine(toy_manifest(max_pairs=4), before=lambda _: time.sleep(0.05))
    with toy_service(tmp_path, engine, max_wait_s=0.3) as service:
        ids = ids_of(service)
        accepted = [service.submit("red", ids) for _ in range(2)]  # the rate is not known yet
        accepted[0].result(10)

        def flood() -> None:
            for _ in range(20):
                accepted.append(service.submit("red", ids))

        with pytest.raises(OverloadedError) as refused:
            flood()
        assert 0 < refused.value.retry_after_s < 5
        for future in accepted:
            future.result(20)
        service.submit("red", ids).result(10)


def test_an_engine_that_fails_once_fails_only_who_was_in_that_batch(tmp_path):
    failing = threading.Event()
    seen: list[Exception] = []

    def before(batch) -> None:
        if failing.is_set():
            raise RuntimeError("the device went away")

    with toy_service(tmp_path, ToyEngine(toy_manifest(max_pairs=8), before)) as service:
        service.worker.on_failure = seen.append
        failing.set()
        with pytest.raises(EngineError, match="the device went away"):
            service.submit("red", ids_of(service)).result(10)
        failing.clear()
        assert len(service.submit("red", ids_of(service)).result(10).order) == 40
        assert seen


def test_the_probe_catches_a_wrong_score_and_one_that_does_not_come(tmp_path):
    engine = ToyEngine(toy_manifest(max_pairs=8))
    with toy_service(tmp_path, engine) as service:
        service.probe()
        service.probe()
        gate = Gate()
        engine.before = gate
        with pytest.raises(EngineError, match=r"no score within 0\.1 s"):
            service.probe(timeout_s=0.1)
        gate.open.set()
        engine.before = None
        service.probe()


def test_closing_answers_what_was_accepted_and_refuses_the_rest(tmp_path):
    engine = ToyEngine(toy_manifest(max_pairs=4), before=lambda _: time.sleep(0.01))
    with toy_service(tmp_path, engine) as service:
        ids = ids_of(service)
        accepted = [service.submit("red", ids) for _ in range(3)]
        service.close()
        assert all(len(future.result(0).order) == len(ids) for future in accepted)
        with pytest.raises(EngineError, match="closing"):
            service.submit("red", ids)
        service.close()


def test_a_drain_that_takes_too_long_fails_what_is_left(tmp_path):
    gate = Gate()
    with toy_service(tmp_path, ToyEngine(toy_manifest(max_pairs=4), before=gate)) as service:
        left = service.submit("red", ids_of(service))
        gate.reached.acquire(timeout=10)
        threading.Timer(0.2, gate.open.set).start()
        service.close(drain_s=0.05)
        with pytest.raises(EngineError, match="closing"):
            left.result(0)


def test_a_thread_that_cannot_start_is_an_error_and_ends_the_other(service, monkeypatch):
    start, started = threading.Thread.start, []

    def start_one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        ScoringService(service.reranker)
    assert started[0].name.startswith("edje-batches")
    assert not started[0].is_alive()


def test_embedding_in_an_event_loop(tiny_engine, tiny_store):
    """What the README shows."""

    async def main() -> list[list[str]]:
        async with ScoringService.open(tiny_engine, store=tiny_store, num_threads=1) as service:
            answers = await asyncio.gather(*(service.rank(q, IDS, top_n=3) for q in QUERIES[:3]))
            return [[hit.id for hit in answer.hits] for answer in answers]

    with Reranker.open(tiny_engine, store=tiny_store, num_threads=1) as reranker:
        expected = [[hit.id for hit in reranker.rank(q, IDS, 3)] for q in QUERIES[:3]]
    assert asyncio.run(main()) == expected


def test_a_cancelled_task_drops_its_request(tmp_path):
    gate = Gate()
    engine = ToyEngine(toy_manifest(max_pairs=4), before=gate)

    async def main(service: ScoringService) -> None:
        ids = ids_of(service)
        for _ in range(2):  # one batch a thread
            service.submit("red", ids[:4])
            wait_until_taken(service)
        task = asyncio.create_task(service.rank("red", ids))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert service.worker.num_dropped == len(ids)
        gate.open.set()

    with toy_service(tmp_path, engine) as service:
        asyncio.run(main(service))


def test_options_that_cannot_be_meant_are_all_named():
    options = ServiceOptions(timeout_s=-1, max_wait_s=float("nan"), unknown="x", max_batch_pairs=0)
    with pytest.raises(RequestError) as refused:
        options.check()
    assert len(refused.value.faults) == 4
    ServiceOptions(timeout_s=inf).check()


def test_smaller_batches_than_the_profiles(tmp_path):
    engine = ToyEngine(toy_manifest(max_pairs=16))
    with toy_service(tmp_path, engine, max_batch_pairs=5) as service:
        service.submit("red", ids_of(service)).result(10)
        assert max(size for size, _ in engine.batches) <= 5


def test_a_damaged_record_is_an_error_of_its_id_alone(tmp_path):
    with toy_service(tmp_path, ToyEngine(toy_manifest(max_pairs=16))) as service:
        ids = ids_of(service)
        (segment,) = (tmp_path / "store" / "segments").glob("*.tokens")
        content = bytearray(segment.read_bytes())
        content[4096 + 10] ^= 1
        segment.write_bytes(content)
        answer = service.submit("red", ids).result(10)
        assert [fault.id for fault in answer.errors] == [ids[0]]
        assert len(answer.order) == len(ids) - 1
