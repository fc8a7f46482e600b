"""Many threads on one reranker, many rerankers after each other, and a forked child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.errors import EngineError
from edje.runtime.opening import RunOptions
from edje.runtime.reranker import Reranker
from edje.runtime.store import TokenStore
from recording_device import CapturableEngine, RecordingDevice
from toy_engine import toy_store, toy_tokenizer

IDS = [f"img-{number}" for number in range(12)]
QUERIES = ["a red circle", "blue square above", "red", "a blue circle above a red square"]


def test_32_threads_get_their_own_scores_from_one_reranker(tiny_engine, tiny_store):
    with Reranker.open(tiny_engine, store=tiny_store, num_threads=1) as reranker:
        expected = {query: reranker.rank(query, IDS).hits for query in QUERIES}
        made = reranker.usage()
        start = threading.Barrier(32)

        def call(number):
            start.wait(30)
            for turn in range(3):
                query = QUERIES[(number + turn) % len(QUERIES)]
                got = reranker.rank(query, IDS)
                assert [hit.id for hit in got] == [hit.id for hit in expected[query]]
                scores = [hit.score for hit in expected[query]]
                assert np.allclose([hit.score for hit in got], scores, atol=1e-5)
            return True

        with ThreadPoolExecutor(32) as pool:
            assert all(pool.map(call, range(32), timeout=60))
        assert reranker.usage() == made
        assert made.pinned_bytes > 0


FIFTY_OPENINGS = """
import gc, os, sys
from edje.kernels.device.contract import DeviceUsage
from edje.runtime.reranker import Reranker

engine, store, *ids = sys.argv[1:]

def cycle():
    reranker = Reranker.open(engine, store=store, num_threads=1)
    assert len(reranker.rank("red", ids)) == len(ids)
    reranker.close()
    assert reranker.usage() == DeviceUsage()

def held():
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

cycle()  # the libraries' own threads and files stay
before = held()
for _ in range(50):
    cycle()
print("files and threads", *before, *held())
"""


def test_50_openings_leave_nothing_behind(tiny_engine, tiny_store):
    """In a process of its own: files that other tests left to the collector close at any time."""
    command = [sys.executable, "-c", FIFTY_OPENINGS, str(tiny_engine), str(tiny_store), *IDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    files, threads, files_after, threads_after = done.stdout.split()[-4:]
    assert (files_after, threads_after) == (files, threads)


def run_forked(work) -> str:
    """Run `work` in a forked child; return what it returns. Kills a child that hangs."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, work().encode())
        finally:
            os._exit(0)
    os.close(write)
    ends = time.monotonic() + 20
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > ends:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked child hung")
        time.sleep(0.005)
    with os.fdopen(read) as pipe:
        return pipe.read()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_to_open_its_own(tiny_engine, tiny_store):
    with Reranker.open(tiny_engine, store=tiny_store, num_threads=1) as reranker:
        reranker.rank("red", IDS)

        def use_it() -> str:
            outcomes = []
            for call in (lambda: reranker.rank("red", IDS), lambda: reranker.predict([("a", "b")])):
                try:
                    call()
                except EngineError as error:
                    outcomes.append(str(error))
            reranker.close()
            return "\n".join(outcomes)

        told = run_forked(use_it)
        assert told.count(f"opened in process {os.getpid()}, this is its forked child") == 2
        assert told.count("open it again in this one") == 2
        assert len(reranker.rank("red", IDS)) == len(IDS), "the parent's was harmed"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_requests_run_can_close(tiny_engine, tiny_store):
    """The child inherits counts and perhaps locks of requests that no thread of it will end."""
    with Reranker.open(tiny_engine, store=tiny_store, num_threads=1) as reranker:
        stop = threading.Event()

        def keep_ranking():
            while not stop.is_set():
                reranker.rank("red", IDS)

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(keep_ranking) for _ in range(4)]
            try:
                told = {run_forked(lambda: str(reranker.close())) for _ in range(5)}
            finally:
                stop.set()
            assert told == {"None"}
            for future in running:
                future.result(20)


def test_stores_that_were_handed_in_stay_open(tiny_engine, tiny_store: Path):
    with TokenStore.open(tiny_store) as store:
        with Reranker.open(tiny_engine, store=store, num_threads=1):
            pass
        assert len(store) == len(IDS)


class EndingEngine(CapturableEngine):
    """Notes how its device stands when it is closed."""

    def __init__(self, device):
        super().__init__()
        self.device, self.ends = device, []

    def close(self):
        is_lost_work = not self.device.is_idle()
        self.ends.append((is_lost_work, self.device.is_capturing(), self.device.closed))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 12), st.lists(st.integers(1, 30), min_size=1))
def test_an_engine_ends_after_all_its_work_outside_any_capture_before_its_device(
    store, toy_words, seed, after, sizes
):
    """In whatever order the device finishes, and whenever another thread closes the reranker."""
    device = RecordingDevice(seed)
    engine = EndingEngine(device)
    reranker = Reranker(engine, toy_words, store, runs=RunOptions(device=device))
    closing = threading.Thread(target=reranker.close)
    asked, errors = [], []

    def is_over():
        asked.append(1)
        if len(asked) == after:
            closing.start()
        return False

    for size in sizes:
        try:
            reranker.rank("red circle", [f"img-{at}" for at in range(size)], cancelled=is_over)
        except EngineError as error:
            errors.append(error.message)
    if len(asked) >= after > 0:
        closing.join(30)
    reranker.close()
    device.close()
    assert all("closed" in message for message in errors)
    assert engine.ends == [(False, False, False)]
    assert device.races == []


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    values = np.random.default_rng(0).standard_normal(30)
    with toy_store(tmp_path_factory.mktemp("toy") / "store", values) as store:
        yield store


@pytest.fixture(scope="module")
def toy_words(tmp_path_factory):
    return toy_tokenizer(tmp_path_factory.mktemp("words"))
