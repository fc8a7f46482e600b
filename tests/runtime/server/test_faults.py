"""What happens when engine, store, disk or client misbehave: one outcome each, right answers else.

Image `img-i` holds the value i, and a query adds what `text_score` says, so every score is known.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edje.engines import registry
from edje.errors import EngineError
from edje.runtime.server import ServiceOptions, bodies, connections
from edje.runtime.server.settings import Settings
from moody_backend import ENTRY, NAME, PIECE, set_mood, text_score, write_engine
from running_server import Reply, Running, running
from toy_engine import toy_store
from waiting import wait_until

NUM_IMAGES = 100
EVERY = [f"img-{i}" for i in range(NUM_IMAGES)]


@pytest.fixture(autouse=True)
def moody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.REGISTRY, NAME, ENTRY)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    toy_store(tmp_path / "store", range(NUM_IMAGES)).close()
    return tmp_path / "store"


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "engine")


@pytest.fixture
def server(engine: Path, store: Path) -> Iterator[Running]:
    patient = ServiceOptions(max_wait_s=600.0)  # a loaded machine is slow, not overloaded
    with running(Settings(engine, store, service=patient)) as started:
        yield started


def ask_for(query: str, ids: list[str], **more: Any) -> dict[str, Any]:
    return {"query": query, "documents": ids, "raw_scores": True, **more}


def check(reply: Reply, query: str, ids: list[str], *, without: tuple[str, ...] = ()) -> None:
    """Every candidate is there, best first, with its own score."""
    assert reply.status == 200, reply.body
    found = {one["index"]: one["relevance_score"] for one in reply.json()["results"]}
    values = {i: float(id.removeprefix("img-")) for i, id in enumerate(ids) if id not in without}
    assert found == pytest.approx({i: v + text_score(query) for i, v in values.items()}, abs=1e-3)
    scores = [one["relevance_score"] for one in reply.json()["results"]]
    assert scores == sorted(scores, reverse=True)


def test_an_engine_that_fails_once_fails_one_request_and_stays_ready(server, engine):
    set_mood(engine, "raise once")
    failed = server.ask("/rerank", ask_for("red", ["img-1"]))
    assert failed.status == 500
    assert failed.json()["message"] == "the engine failed"
    assert "mood" not in failed.body.decode()  # what it was is for the log alone
    assert any("bad mood" in line.get("cause", "") for line in server.lines())
    check(server.ask("/rerank", ask_for("red", EVERY)), "red", EVERY)
    wait_until(lambda: server.ask("/readyz").status == 200)


def test_a_batch_that_fails_fails_only_the_guilty_request(server, engine):
    set_mood(engine, "raise at 7")
    mixed = [["img-3", "img-7"] if i % 5 == 0 else [f"img-{i}", "img-50"] for i in range(60)]
    mixed = [ids for ids in mixed if "img-7" not in ids or ids[0] == "img-3"]

    def ask(ids: list[str]) -> Reply:
        return server.ask("/rerank", ask_for("blue", ids))

    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(ask, mixed))
    for ids, reply in zip(mixed, replies, strict=True):
        if "img-7" in ids:
            assert reply.status == 500
        else:
            check(reply, "blue", ids)


def test_an_engine_that_fails_always_is_not_ready_and_then_dead(engine, store):
    deaths: list[str] = []
    with running(Settings(engine, store), on_death=deaths.append) as server:
        set_mood(engine, "raise")
        assert server.ask("/rerank", ask_for("red", ["img-1"])).status == 500
        wait_until(lambda: len(deaths) == 1)
        assert server.ask("/readyz").status == 503
        assert server.ask("/livez").status == 200
    assert "bad mood" in deaths[0]


def test_a_failing_probe_is_forgiven_once_the_engine_is_well_again(engine, store):
    deaths: list[str] = []
    options = {"on_death": deaths.append, "probe_every_s": 0.05}
    with running(Settings(engine, store), **options) as server:
        set_mood(engine, "raise once")
        wait_until(lambda: not (engine / "mood").read_text().startswith("raise"))
        wait_until(lambda: server.ask("/readyz").status == 200)
        time.sleep(0.3)
        assert not deaths


def test_an_engine_that_scores_wrong_is_caught_by_the_probe(engine, store):
    deaths: list[str] = []
    options = {"on_death": deaths.append, "probe_every_s": 0.05}
    with running(Settings(engine, store), **options) as server:
        set_mood(engine, "wrong")
        wait_until(lambda: server.ask("/readyz").status == 503)
        why = server.ask("/readyz").json()["why"]
        assert "a known pair" in why or "dead" in why
        wait_until(lambda: bool(deaths))


def test_an_engine_that_hangs_is_not_ready_and_then_dead(engine, store):
    deaths: list[str] = []
    options = {"on_death": deaths.append, "probe_every_s": 0.05, "probe_timeout_s": 0.2}
    with running(Settings(engine, store), **options) as server:
        set_mood(engine, "hang")
        wait_until(lambda: bool(deaths))
        assert server.ask("/readyz").status == 503
        assert server.ask("/livez").status == 200
        set_mood(engine, "fine")


def test_no_load_makes_a_sound_engine_look_dead(engine, store):
    """Requests with early deadlines go first, but never before the probe."""
    deaths: list[str] = []
    service = ServiceOptions(max_wait_s=60.0)
    options = {"on_death": deaths.append, "probe_every_s": 0.1, "probe_timeout_s": 5.0}
    with running(Settings(engine, store, service=service), **options) as server:
        set_mood(engine, "sleep 0.02")  # 400 pairs/s
        ready: list[int] = []

        def press(number: int) -> set[int]:
            until, seen = time.monotonic() + 3.0, set()
            hurried = {"x-request-timeout-ms": "950"}
            while time.monotonic() < until:
                body = ask_for("red", EVERY[number % 50 :])
                seen.add(server.ask("/rerank", body, headers=hurried).status)
            return seen

        with ThreadPoolExecutor(24) as pool:
            under_way = [pool.submit(press, number) for number in range(24)]
            while not all(one.done() for one in under_way):
                ready.append(server.ask("/readyz").status)
                time.sleep(0.05)
        assert set().union(*(one.result() for one in under_way)) <= {200, 429, 504}
        assert not deaths
        assert set(ready) == {200}


def test_scores_that_are_no_numbers_are_errors_of_their_images(server, engine):
    set_mood(engine, "nan at 7")
    reply = server.ask("/rerank", ask_for("red", EVERY))
    check(reply, "red", EVERY, without=("img-7",))
    assert [one["id"] for one in reply.json()["errors"]] == ["img-7"]
    assert server.metric("edje_bad_records_total") == 1
    assert b"NaN" not in reply.body
    assert server.ask("/score", {"text_1": "red", "text_2": EVERY}).json()["data"][7]["score"] == 0


def test_a_record_damaged_under_load_is_an_error_of_its_image_alone(server, store):
    ids, seen = EVERY[40:60], []

    def press(_: int) -> None:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            reply = server.ask("/rerank", ask_for("red", ids))
            bad = tuple(one["id"] for one in reply.json().get("errors", ()))
            seen.append(bad)
            check(reply, "red", ids, without=bad)

    with ThreadPoolExecutor(4) as pool:
        under_way = [pool.submit(press, number) for number in range(4)]
        time.sleep(0.3)
        damage(store, 47)
        for one in under_way:
            one.result()
    assert set(seen) == {(), ("img-47",)}
    assert server.ask("/readyz").status == 200


def damage(store: Path, value: int) -> None:
    """Flip one byte of the record that holds `value`."""
    record = np.full(32, value, np.float16).tobytes()
    (path,) = (store / "segments").iterdir()
    at = path.read_bytes().index(record)
    with path.open("r+b") as file:
        file.seek(at + 5)
        file.write(bytes([record[5] ^ 0x10]))


def test_different_queries_in_one_batch_never_mix(engine, store):
    words = list(PIECE)
    queries = [" ".join(words[: n + 1]) for n in range(5)] + words + ["red red", "a a a"]
    assert len({text_score(query) for query in queries}) > 9
    with running(Settings(engine, store)) as server:
        set_mood(engine, "sleep 0.002")

        def ask(number: int) -> None:
            query = queries[number % len(queries)]
            ids = [EVERY[(number * 7 + i * 3) % NUM_IMAGES] for i in range(1 + number % 5)]
            check(server.ask("/rerank", ask_for(query, ids)), query, ids)

        with ThreadPoolExecutor(32) as pool:
            list(pool.map(ask, range(600)))
        assert server.metric("edje_batch_pairs_sum") / server.metric("edje_batch_pairs_count") > 4


def test_a_deadline_is_kept_and_what_is_late_is_not_computed(server, engine):
    set_mood(engine, "sleep 0.1")
    began = time.monotonic()
    late = server.ask("/rerank", ask_for("red", EVERY * 4), headers={"x-request-timeout-ms": "300"})
    assert late.status == 504
    assert 0.25 < time.monotonic() - began < 0.6
    assert late.json()["error"]["type"] == "deadline"
    wait_until(lambda: server.metric("edje_dropped_pairs_total") > 0)
    set_mood(engine, "fine")
    check(server.ask("/rerank", ask_for("red", EVERY)), "red", EVERY)


def test_an_odd_deadline_is_refused_or_no_deadline(server):
    for header in ("soon", "-5", "0", "1.5", "", "\uff19"):
        found = server.ask(
            "/rerank", ask_for("red", EVERY), headers={"x-request-timeout-ms": header.encode()}
        )
        assert found.status == 400, header
    for digits in (12, 40, 400, 5000):
        given = {"x-request-timeout-ms": "9" * digits}
        check(server.ask("/rerank", ask_for("red", EVERY), headers=given), "red", EVERY)


def test_a_service_without_deadline_serves(engine, store):
    service = ServiceOptions(timeout_s=float("inf"))
    with running(Settings(engine, store, service=service)) as server:
        check(server.ask("/rerank", ask_for("red", EVERY)), "red", EVERY)
        assert server.metric("edje_dropped_pairs_total") == 0


def test_what_a_client_that_left_asked_for_is_not_computed(server, engine):
    set_mood(engine, "sleep 0.05")
    with open_socket(server) as client:
        client.sendall(raw_request(ask_for("red", EVERY * 10)))
        time.sleep(0.4)
    wait_until(lambda: server.metric("edje_disconnects_total") == 1)
    dropped = server.metric("edje_dropped_pairs_total")
    assert dropped > 0
    assert server.metric("edje_requests_in_flight") == 0
    scored = server.metric("edje_pairs_total")
    time.sleep(0.3)
    assert server.metric("edje_pairs_total") <= scored + 2 * 8  # what was in batches, and no more


def test_a_body_that_does_not_come_is_408(server, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.2)
    with open_socket(server) as client:
        client.sendall(raw_request(ask_for("red", EVERY))[:-10])
        answer = client.recv(1 << 16)
        assert b" 408 " in answer.split(b"\r\n", 1)[0]
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "slow"
        assert client.recv(1) == b""  # and the connection is at its end
    check(server.ask("/rerank", ask_for("red", EVERY)), "red", EVERY)


@pytest.mark.parametrize("sent", [b"", b"POST /rer", b"POST /rerank HTTP/1.1\r\nhost: x\r\nco"])
def test_a_head_that_does_not_come_ends_the_connection(server, monkeypatch, sent):
    monkeypatch.setattr(connections, "HEAD_TIMEOUT_S", 0.2)
    with open_socket(server) as client:
        client.sendall(sent)
        assert ended(client)
    with open_socket(server) as client:  # the second request of a connection
        client.sendall(raw_request(ask_for("red", ["img-1"])))
        assert b" 200 " in client.recv(1 << 16)
        if sent:
            client.sendall(sent)
            assert ended(client)


def test_a_head_that_comes_slowly_but_in_time_is_served(server):
    with open_socket(server) as client:
        whole = raw_request(ask_for("red", ["img-1"]))
        for at in range(0, len(whole), 20):
            client.sendall(whole[at : at + 20])
            time.sleep(0.01)
        assert b" 200 " in client.recv(1 << 16)


@pytest.mark.parametrize("large", [True, False])
def test_a_client_that_does_not_read_is_left(server, monkeypatch, large):
    """One answer that is larger than all buffers, or many small ones that fill them."""
    monkeypatch.setattr(connections, "READER_TIMEOUT_S", 0.3)
    number = 1 if large else 3000
    ids = EVERY * 4000 if large else ["unknown"] * 20  # small ones are refusals: they cost least
    with open_socket(server) as client:
        if not large:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        wholly = number * len(server.ask("/rerank", ask_for("red", ids)).body)
        with suppress(OSError):  # the server leaves meanwhile
            for _ in range(number):
                client.sendall(raw_request(ask_for("red", ids)))
        check(server.ask("/rerank", ask_for("blue", EVERY)), "blue", EVERY)
        time.sleep(1.5)
        assert read_to_the_end(client) < wholly


def test_a_body_that_is_too_large_is_413(engine, store):
    with running(Settings(engine, store, max_body_bytes=10_000)) as server:
        told = server.ask("/rerank", ask_for("red", EVERY * 50))
        assert told.status == 413
        assert told.json()["error"]["type"] == "too_large"
        with open_socket(server) as client:  # no length is told
            client.sendall(
                b"POST /rerank HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            client.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
            assert b" 413 " in client.recv(1 << 16)
        check(server.ask("/rerank", ask_for("red", EVERY)), "red", EVERY)


def test_keys_open_and_limit(engine, store):
    settings = Settings(engine, store, keys=["one", "two"], max_pairs_per_key=150)
    with running(settings) as server:
        body, one = ask_for("red", EVERY), {"authorization": "Bearer one"}
        for wrong in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer onee"}):
            reply = server.ask("/rerank", body, headers=wrong)
            assert reply.status == 401
            assert reply.headers["www-authenticate"] == "Bearer"
        assert server.ask("/info").status == 401
        assert server.ask("/readyz").status == 200
        check(server.ask("/rerank", body, headers={"authorization": "two"}), "red", EVERY)
        set_mood(engine, "sleep 0.05")
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(server.ask, "/rerank", body, headers=one)
            time.sleep(0.2)
            refused = server.ask("/rerank", body, headers=one)
            assert refused.status == 429
            assert refused.headers["retry-after"]
            other = pool.submit(server.ask, "/rerank", body, headers={"authorization": "two"})
            check(first.result(), "red", EVERY)
            check(other.result(), "red", EVERY)
        check(server.ask("/rerank", body, headers=one), "red", EVERY)


def test_overload_is_refused_at_once_and_says_when_to_come_back(engine, store):
    service = ServiceOptions(max_wait_s=0.5)
    with running(Settings(engine, store, service=service)) as server:
        set_mood(engine, "sleep 0.02")  # 400 pairs/s
        check(server.ask("/rerank", ask_for("red", EVERY)), "red", EVERY)
        times: dict[int, list[float]] = {200: [], 429: []}

        def press(_: int) -> None:
            until = time.monotonic() + 3.0
            while time.monotonic() < until:
                began = time.monotonic()
                reply = server.ask("/rerank", ask_for("red", EVERY))
                times[reply.status].append(time.monotonic() - began)
                if reply.status == 429:
                    assert 1 <= int(reply.headers["retry-after"]) <= 5
                    time.sleep(0.02)
                else:
                    check(reply, "red", EVERY)

        with ThreadPoolExecutor(24) as pool:
            list(pool.map(press, range(24)))
        assert len(times[429]) > 20
        assert len(times[200]) >= 6
        assert float(np.median(times[429])) < 0.1
        assert max(times[200]) < 0.5 + 2 * 0.25 + 1.0  # what waited, its own, and this machine


def test_a_reload_under_load_loses_no_request(server, engine):
    stop = threading.Event()

    def press(number: int) -> int:
        done = 0
        while not stop.is_set():
            ids = EVERY[number : number + 40]
            check(server.ask("/rerank", ask_for("red", ids)), "red", ids)
            done += 1
        return done

    with ThreadPoolExecutor(8) as pool:
        under_way = [pool.submit(press, number) for number in range(8)]
        try:
            for _ in range(5):
                server.host.reload()
                time.sleep(0.1)
        finally:
            stop.set()
        assert sum(one.result() for one in under_way) > 20
    assert server.ask("/info").json()["generation"] == 6
    assert server.metric('edje_reloads_total{outcome="done"}') == 5


@pytest.mark.parametrize("how", ["unopenable", "raise", "no manifest", "no tokenizer", "no store"])
def test_a_reload_that_fails_keeps_what_serves(server, engine, store, how):
    moved: tuple[Path, Path] | None = None
    if how.startswith("no "):
        path = {"manifest": engine / "engine.json", "tokenizer": engine / "tokenizer.json"}
        gone = path.get(how[3:], store)
        moved = gone.rename(gone.with_name("gone")), gone
    else:
        set_mood(engine, how)
    with pytest.raises(EngineError) if how == "raise" else pytest.raises(Exception):  # noqa: PT011
        server.host.reload()
    set_mood(engine, "fine")
    if moved:
        moved[0].rename(moved[1])
    assert server.ask("/info").json()["generation"] == 1
    assert server.metric('edje_reloads_total{outcome="failed"}') == 1
    check(server.ask("/rerank", ask_for("red", EVERY)), "red", EVERY)
    server.host.reload()
    assert server.ask("/info").json()["generation"] == 2


def open_socket(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=5.0)


def raw_request(body: Any) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST /rerank HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def read_to_the_end(client: socket.socket) -> int:
    """Read until the server has ended the connection; return the number of bytes."""
    number = 0
    with suppress(ConnectionError):
        while part := client.recv(1 << 20):
            number += len(part)
    return number


def ended(client: socket.socket, seconds: float = 3.0) -> bool:
    """Whether the server ends the connection, without our reading what it sent before."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.05)
        try:
            client.send(b"")
            if client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return True
            client.setblocking(False)
            if client.recv(1, socket.MSG_PEEK) == b"":
                return True
        except BlockingIOError:
            pass
        except OSError:
            return True
    return False


def test_an_overload_is_told_in_the_words_of_who_asked(engine, store):
    """The body is not decoded then, but for dialects whose refusals read otherwise."""
    with running(Settings(engine, store, service=ServiceOptions(max_wait_s=0.0))) as server:
        check(server.ask("/rerank", ask_for("red", EVERY)), "red", EVERY)
        set_mood(engine, "sleep 0.1")
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(server.ask, "/rerank", ask_for("red", EVERY))
            wait_until(lambda: server.host.service.load().num_pairs)
            asked: dict[str, tuple[str, dict[str, Any]]] = {
                "cohere": ("/rerank", ask_for("red", EVERY)),
                "tei": ("/rerank", {"query": "red", "texts": EVERY}),
                "voyage": ("/rerank", ask_for("red", EVERY, truncation=True)),
                "nvidia": ("/ranking", {"query": {"text": "red"}, "passages": []}),
            }
            for dialect, (path, body) in asked.items():
                reply = server.ask(path, body)
                assert reply.status == 429
                assert reply.headers["retry-after"] == "1"
                told = reply.json()
                is_sentence = dialect in ("tei", "voyage")
                assert told["message"] == (told["error"] if is_sentence else told["detail"])
                assert isinstance(told["error"], str) is is_sentence
                counted = f'edje_requests_total{{dialect="{dialect}",status="429"}}'
                assert server.metric(counted) == 1
            check(held.result(), "red", EVERY)
        assert server.metric('edje_refusals_total{reason="overloaded"}') == 4
