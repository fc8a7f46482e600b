"""Health that tells the truth, and reloads that lose nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from edje.errors import EdjeError, EngineError, RequestError
from edje.runtime.reranker import Reranker
from edje.runtime.server import ScoringService
from edje.runtime.server.settings import Settings
from running_server import GivenSettings, Running, running, settings_of
from toy_engine import ToyEngine, toy_manifest, toy_store, toy_tokenizer
from waiting import wait_until

IDS = [f"img-{number}" for number in range(12)]


class Toys:
    """Opens services over toy engines, as a reload does; `change` is what the next ones do."""

    def __init__(self, folder: Path, cleaning: ExitStack):
        self._folder, self._cleaning = folder, cleaning
        self.engines: list[ToyEngine] = []
        self.before: Callable[[object], None] | None = None
        self.fault: EdjeError | None = None

    def __call__(self) -> ScoringService:
        if self.fault is not None:
            raise self.fault
        engine = ToyEngine(toy_manifest(max_pairs=8), before=self.before)
        store = toy_store(self._folder / f"store-{len(self.engines)}", np.linspace(-2, 2, 12))
        self.engines.append(engine)
        reranker = Reranker(engine, toy_tokenizer(self._folder), store)
        self._cleaning.callback(reranker.close)
        return ScoringService(reranker)


@pytest.fixture
def toys(tmp_path: Path) -> Iterator[Toys]:
    with ExitStack() as cleaning:
        yield Toys(tmp_path, cleaning)


def ready(server: Running) -> int:
    return server.ask("/readyz").status


def test_ready_follows_a_known_pair_and_live_the_loop(toys):
    with running(GivenSettings(opens=toys), probe_every_s=0.05, probe_timeout_s=0.3) as server:
        assert ready(server) == 200
        hold = threading.Event()
        toys.engines[0].before = lambda _: hold.wait(20) and None
        wait_until(lambda: ready(server) == 503)
        assert server.ask("/livez").status == 200
        assert "no score within" in server.ask("/readyz").json()["why"]
        toys.engines[0].before = None
        hold.set()
        wait_until(lambda: ready(server) == 200)


def test_a_passing_fault_costs_readiness_and_not_the_process(toys):
    deaths: list[str] = []
    with running(GivenSettings(opens=toys), probe_every_s=0.05, on_death=deaths.append) as server:
        failing = threading.Event()
        failing.set()

        def fail_once(_: object) -> None:
            if failing.is_set():
                failing.clear()
                raise RuntimeError("a passing fault")

        toys.engines[0].before = fail_once
        wait_until(lambda: not failing.is_set())
        wait_until(lambda: ready(server) == 200)
        assert deaths == []


def test_an_engine_that_fails_again_and_again_is_dead(toys):
    deaths: list[str] = []
    with running(GivenSettings(opens=toys), probe_every_s=0.05, on_death=deaths.append) as server:

        def fail(_: object) -> None:
            raise RuntimeError("the device is gone")

        toys.engines[0].before = fail
        reply = server.ask("/rerank", {"query": "red", "documents": IDS})
        assert reply.status == 500
        assert reply.json()["message"] == "the engine failed", "what failed is in the log alone"
        wait_until(lambda: deaths != [])
        assert ready(server) == 503
        assert server.ask("/readyz").json()["why"] == "the engine is dead"
        assert any("device is gone" in line.get("error", "") for line in server.lines())


def test_scores_that_are_wrong_are_no_health(toys):
    deaths: list[str] = []
    with running(GivenSettings(opens=toys), probe_every_s=0.05, on_death=deaths.append) as server:
        original = toys.engines[0]._infer  # the toy's own promise: tests may bend it

        def wrong(batch, scores) -> None:
            original(batch, scores)
            scores += 1

        toys.engines[0]._infer = wrong
        wait_until(lambda: deaths != [])
        assert "scores a known pair" in deaths[0]
        assert ready(server) == 503


def test_a_service_that_fails_its_first_probe_does_not_start(toys):
    def fail(_: object) -> None:
        raise RuntimeError("broken from the start")

    toys.before = fail
    with (
        pytest.raises(EngineError, match="broken from the start"),
        running(GivenSettings(opens=toys)),
    ):
        pass


def test_a_reload_takes_over_without_losing_a_request(toys):
    with running(GivenSettings(opens=toys)) as server:
        stop = threading.Event()

        def ask(_: int) -> list[int]:
            statuses = []
            while not stop.is_set():
                statuses.append(server.ask("/rerank", {"query": "red", "documents": IDS}).status)
            return statuses

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask, number) for number in range(4)]
            for _ in range(3):
                time.sleep(0.1)
                server.host.reload()
            time.sleep(0.1)
            stop.set()
            statuses = [status for future in asking for status in future.result(20)]
        assert set(statuses) == {200}
        assert server.host.generation == 4
        assert [len(engine.batches) > 1 for engine in toys.engines] == [True] * 4
        assert server.metric('edje_reloads_total{outcome="done"}') == 3


def test_a_reload_that_fails_keeps_what_runs(toys):
    with running(GivenSettings(opens=toys)) as server:
        toys.fault = EngineError("the new engine is stale")
        with pytest.raises(EngineError, match="stale"):
            server.host.reload()
        assert ready(server) == 200
        assert server.host.generation == 1
        assert server.ask("/rerank", {"query": "red", "documents": IDS}).status == 200
        assert server.metric('edje_reloads_total{outcome="failed"}') == 1


@contextmanager
def no_more_threads() -> Iterator[None]:
    """Let the system refuse every new thread of Python's, as one at its limit does."""
    before = threading.stack_size(1 << 46)  # more than there are addresses for
    try:
        yield
    finally:
        threading.stack_size(before)


def test_a_reload_that_the_system_does_not_allow_is_counted_told_and_changes_nothing(
    tiny_engine, tiny_store
):
    with running(settings_of(tiny_engine, tiny_store)) as server:
        before = server.host.service
        with no_more_threads(), pytest.raises(RuntimeError, match="start new thread"):
            server.host.reload()
        assert server.host.service is before
        assert server.host.generation == 1
        assert server.ask("/rerank", {"query": "red", "documents": IDS}).status == 200
        assert server.metric('edje_reloads_total{outcome="failed"}') == 1
        (told,) = [line for line in server.lines() if line["event"] == "reload"]
        assert told["outcome"] == "failed"
        assert "start new thread" in told["error"]
        server.host.reload()
        assert server.host.generation == 2


def test_a_reload_sees_what_was_indexed_meanwhile(tiny_engine, tiny_store, tmp_path):
    import shutil

    from edje.runtime.store import TokenStore

    folder = tmp_path / "store"
    shutil.copytree(tiny_store, folder)
    with running(settings_of(tiny_engine, folder)) as server:
        body = {"query": "red", "documents": ["new"]}
        assert server.ask("/rerank", body).status == 422
        with TokenStore.open(folder, mode="a") as store:
            layout = store.layout
            tokens = np.zeros((1, layout.num_tokens, layout.hidden), np.float16)
            store.append(["new"], tokens)
        server.host.reload()
        assert server.ask("/rerank", body).status == 200


def test_draining_is_not_ready_and_still_serves(toys):
    with running(GivenSettings(opens=toys)) as server:
        server.host.drain("the server is ending")
        assert ready(server) == 503
        assert server.ask("/rerank", {"query": "red", "documents": IDS}).status == 200


def test_settings_that_cannot_be_meant_are_all_named(tmp_path):
    settings = Settings(
        Path("e"),
        Path("s"),
        model="",
        keys=("", " a"),
        id_pattern="(",
        images=tmp_path / "none",
        max_pairs_per_key=0,
    )
    with pytest.raises(RequestError) as refused:
        settings.check()
    assert len(refused.value.faults) == 5
