"""What only a process of its own can show: signals, exit codes, a log that cannot be written."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from pathlib import Path

import pytest

from edje.perf.server_process import ServerProcess, serving
from moody_backend import COMMAND, set_mood, text_score, write_engine
from toy_engine import toy_store
from waiting import wait_until

moody = partial(serving, command=COMMAND)
IDS = [f"img-{i}" for i in range(24)]
BODY = {"query": "red", "documents": IDS, "raw_scores": True, "top_n": 1}
BEST = pytest.approx(23 + text_score("red"), abs=1e-3)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    toy_store(tmp_path / "store", range(24)).close()
    return tmp_path / "store"


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "engine")


def right(server: ServerProcess) -> bool:
    """Whether a request is answered right; OSError where it was never accepted."""
    import json

    status, raw = server.ask("/rerank", BODY)
    assert status == 200, raw
    assert json.loads(raw)["results"][0]["relevance_score"] == BEST
    return True


def test_sigterm_answers_all_that_was_accepted(engine, store):
    with moody(engine, store) as server, ThreadPoolExecutor(12) as pool:
        set_mood(engine, "sleep 0.05")
        accepted = [pool.submit(right, server) for _ in range(12)]
        wait_until(lambda: server.metrics()["edje_requests_in_flight"] >= 12)
        assert server.end() == 0
        assert all(one.result() for one in accepted)


def test_sigkill_under_load_leaves_nothing_broken(engine, store):
    with moody(engine, store) as server, ThreadPoolExecutor(4) as pool:
        set_mood(engine, "sleep 0.05")
        waiting = [pool.submit(right, server) for _ in range(4)]
        time.sleep(0.2)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        for one in waiting:
            with pytest.raises((OSError, HTTPException)):
                one.result()  # the client learns at once
    set_mood(engine, "fine")
    with moody(engine, store) as server:
        assert right(server)


def test_sighup_reloads_under_load_and_loses_nothing(engine, store):
    with moody(engine, store) as server, ThreadPoolExecutor(4) as pool:
        stop = threading.Event()

        def press(_: int) -> int:
            done = 0
            while not stop.is_set():
                done += right(server)
            return done

        under_way = [pool.submit(press, number) for number in range(4)]
        for generation in (2, 3):
            server.send(signal.SIGHUP)
            told = b'"generation":%d' % generation
            wait_until(lambda told=told: told in server.ask("/info")[1])
        stop.set()
        assert sum(one.result() for one in under_way) > 4
        assert server.end() == 0


def test_a_dead_engine_ends_the_process_with_1(engine, store):
    with moody(engine, store) as server:
        set_mood(engine, "raise")
        assert server.ask("/rerank", BODY)[0] == 500
        assert server.wait() == 1


def test_a_full_disk_for_the_log_stops_no_request(engine, store):
    with (
        open("/dev/full", "wb") as full,
        moody(engine, store, stderr=full) as server,
    ):
        for _ in range(5):
            assert right(server)
        time.sleep(0.3)
        assert server.metrics()["edje_log_lines_lost_total"] >= 5
        assert server.end() == 0


@pytest.mark.parametrize("full", ["from the start", "once it serves"])
def test_a_log_that_nobody_reads_stops_no_request(engine, store, full):
    reading, writing = os.pipe()
    try:
        if full == "from the start":
            fill(writing)
        with moody(engine, store, stderr=writing) as server:
            if full == "once it serves":
                said = b""
                while b"serving" not in said:
                    said += os.read(reading, 1 << 16)
                fill(writing)
            for _ in range(20):
                assert right(server)
            assert server.ask("/nowhere")[0] == 404
            assert right(server)
            assert server.end() == 0
    finally:
        os.close(reading)
        os.close(writing)


def fill(pipe: int) -> None:
    """Fill a pipe, then let it block again."""
    os.set_blocking(pipe, False)
    try:
        while os.write(pipe, bytes(1 << 16)):
            pass
    except BlockingIOError:
        pass
    finally:
        os.set_blocking(pipe, True)
