"""A router over real servers ranks as one reranker over all ids, and says what it cannot."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest

from edje import Reranker
from edje.errors import EngineError
from edje.perf.server_process import serving
from edje.runtime.server import ServiceOptions
from edje.runtime.store import TokenStore
from running_server import GivenSettings, Running, running, settings_of
from sharded import CLOSED, Busy, Silent, cut, routing
from waiting import wait_until

IDS = [f"img-{number}" for number in range(12)]
PARTS = [IDS[0::3], IDS[1::3], IDS[2::3]]
QUERY = "a red circle"
ASKED = [*reversed(IDS), "img-3", "img-3", "img-10"]


@pytest.fixture(scope="module")
def stores(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    return [cut(tiny_store, part, folder / str(at)) for at, part in enumerate(PARTS)]


@pytest.fixture(scope="module")
def shards(tiny_engine: Path, stores: list[Path]) -> Iterator[list[Running]]:
    with ExitStack() as stack:
        yield [stack.enter_context(running(settings_of(tiny_engine, each))) for each in stores]


@pytest.fixture(scope="module")
def router(shards: list[Running]) -> Iterator[Running]:
    with routing(*[[each.url] for each in shards]) as started:
        yield started


@pytest.fixture(scope="module")
def whole(tiny_engine: Path, tiny_store: Path) -> Iterator[Reranker]:
    with Reranker.open(tiny_engine, store=tiny_store, num_threads=1) as opened:
        yield opened


def rerank(server: Running, documents: list[str], **fields):
    headers = fields.pop("headers", None)
    return server.ask(
        "/v2/rerank", {"query": QUERY, "documents": documents, **fields}, headers=headers
    )


def order_of(reply) -> list[int]:
    assert reply.status == 200, reply.body
    return [result["index"] for result in reply.json()["results"]]


def test_the_ranking_is_that_of_one_reranker_over_all_ids(router: Running, whole: Reranker):
    expected = whole.rank(QUERY, ASKED)
    reply = rerank(router, ASKED, raw_scores=True)
    assert order_of(reply) == [hit.index for hit in expected]  # duplicates in the order given
    scores = [result["relevance_score"] for result in reply.json()["results"]]
    assert scores == pytest.approx([hit.score for hit in expected], abs=1e-5)
    assert reply.json()["meta"]["warnings"] == []


def test_top_n_cuts_after_the_merge(router: Running, whole: Reranker):
    best = [hit.index for hit in whole.rank(QUERY, IDS, top_k=4)]
    assert order_of(rerank(router, IDS, top_n=4)) == best


def test_only_the_shards_that_hold_candidates_are_asked(router: Running, shards: list[Running]):
    before = [each.metric("edje_requests_total") for each in shards]
    order_of(rerank(router, PARTS[1]))
    after = [each.metric("edje_requests_total") for each in shards]
    # Reading the metrics counts for nothing; asking for health and ids neither.
    assert [now - then for then, now in zip(before, after, strict=True)] == [0, 1, 0]


def test_thousands_of_candidates_come_back_in_order(router: Running, whole: Reranker):
    many = [IDS[at] for at in np.random.default_rng(0).integers(0, 12, 30_000)]  # a large body
    expected = [hit.index for hit in whole.rank(QUERY, many)]
    assert order_of(rerank(router, many)) == expected


def test_kserve_and_tei_are_routed_too(router: Running, whole: Reranker):
    body = {
        "inputs": [
            {"name": "QUERY", "datatype": "BYTES", "shape": [1], "data": [QUERY]},
            {"name": "IDS", "datatype": "BYTES", "shape": [12], "data": IDS},
        ]
    }
    scores = router.ask("/v2/models/edje/infer", body).json()["outputs"][0]["data"]
    expected = {hit.index: hit.score for hit in whole.rank(QUERY, IDS)}
    assert scores == pytest.approx([expected[at] for at in range(12)], abs=1e-5)
    tei = router.ask("/rerank", {"query": QUERY, "texts": IDS}).json()
    assert [one["index"] for one in tei] == list(expected)


def test_rows_are_refused_since_they_are_of_one_store(router: Running):
    tensor = {"name": "ROWS", "datatype": "INT64", "shape": [1], "data": [0]}
    query = {"name": "QUERY", "datatype": "BYTES", "shape": [1], "data": [QUERY]}
    reply = router.ask("/v2/models/edje/infer", {"inputs": [query, tensor]})
    assert (reply.status, "send ids" in reply.json()["message"]) == (422, True)


def test_unknown_ids_follow_the_rule(shards: list[Running], router: Running):
    asked = ["img-4", "who", "img-2", "no-one"]
    refused = rerank(router, asked)
    assert refused.status == 422
    assert [fault["loc"][-1] for fault in refused.json()["detail"]] == [1, 3]
    urls = [[each.url] for each in shards]
    with routing(*urls, service=ServiceOptions(unknown="lowest")) as lowest:
        reply = rerank(lowest, asked)
        assert order_of(reply)[2:] == [1, 3]
        assert [r["relevance_score"] for r in reply.json()["results"]][2:] == [0.0, 0.0]
        assert reply.headers["x-edje-missing"] == "2;who,no-one"
        assert order_of(rerank(lowest, ["who", "no-one"])) == [0, 1]  # no shard is asked
    with routing(*urls, service=ServiceOptions(unknown="skip")) as skip:
        assert sorted(order_of(rerank(skip, asked))) == [0, 2]


def test_what_a_shard_refuses_reaches_the_client(router: Running):
    reply = router.ask("/rerank", {"query": " ", "documents": IDS})
    assert reply.status == 422
    reply = rerank(router, IDS, top_n=-1)
    assert reply.status == 422


def test_info_and_metrics_tell_of_the_shards(router: Running, shards: list[Running]):
    order_of(rerank(router, IDS))
    info = router.ask("/info").json()
    assert (info["num_images"], info["num_shards"], info["num_doubles"]) == (12, 3, 0)
    told = shards[0].ask("/info").json()
    assert info["fingerprint_scorer"] == told["fingerprint_scorer"]
    assert router.metric('edje_shard_requests_total{shard="shard 2",status="200"}') >= 1
    assert router.metric('edje_shard_ready_replicas{shard="shard 0"}') == 1
    assert router.ask("/ids/digests").status == 404


def test_an_id_that_two_shards_hold_is_scored_once(
    shards: list[Running], tiny_engine: Path, tiny_store: Path, whole: Reranker
):
    with (
        running(settings_of(tiny_engine, tiny_store)) as everything,
        routing([shards[1].url], [everything.url]) as router,
    ):
        expected = [hit.index for hit in whole.rank(QUERY, ASKED)]
        assert order_of(rerank(router, ASKED)) == expected
        assert router.ask("/info").json()["num_doubles"] == 4


def test_a_damaged_record_is_an_error_entry(
    tiny_engine: Path, stores: list[Path], shards: list[Running], tmp_path: Path
):
    broken = tmp_path / "broken"
    shutil.copytree(stores[2], broken)
    with TokenStore.open(broken) as store:
        stride = store.layout.stride
    segment = next((broken / "segments").iterdir())
    with segment.open("r+b") as file:
        file.seek(4096 + stride)  # the second record: img-5
        file.write(b"\xff" * 64)
    with (
        running(settings_of(tiny_engine, broken)) as third,
        routing([shards[0].url], [shards[1].url], [third.url]) as router,
    ):
        reply = rerank(router, IDS)
        assert sorted(order_of(reply)) == [at for at in range(12) if at != 5]
        assert reply.json()["errors"][0]["index"] == 5


def test_new_ids_of_a_shard_are_found_after_its_reload(
    tiny_engine: Path, tiny_store: Path, shards: list[Running], tmp_path: Path
):
    small = cut(tiny_store, PARTS[2][:2], tmp_path / "small")
    with (
        running(settings_of(tiny_engine, small)) as third,
        routing([shards[0].url], [shards[1].url], [third.url]) as router,
    ):
        assert rerank(router, IDS).status == 422
        with TokenStore.open(tiny_store) as source, TokenStore.open(small, mode="a") as target:
            layout = source.layout
            tokens = np.empty((2, layout.num_tokens, layout.hidden), layout.dtype)
            source.read(source.rows(PARTS[2][2:]), tokens)
            target.append(PARTS[2][2:], tokens)
        third.host.reload()
        wait_until(lambda: rerank(router, IDS).status == 200)


def test_a_request_without_time_ends_at_its_deadline(
    tiny_engine: Path, stores: list[Path], shards: list[Running]
):
    with (
        silent(tiny_engine, stores[2]) as (third, service),
        routing([shards[0].url], [third.url]) as router,
    ):
        asked = [*PARTS[0], *PARTS[2]]
        began = time.monotonic()
        reply = rerank(router, asked, headers={"x-request-timeout-ms": "400"})
        assert reply.status == 504
        assert time.monotonic() - began < 5.0
        (options, future), *_ = service.asked
        assert 0 < options["timeout_s"] <= 0.4  # what was left is passed on
        wait_until(future.done)
        partly = rerank(router, asked, allow_partial=True, headers={"x-request-timeout-ms": "400"})
        assert sorted(order_of(partly)) == [0, 1, 2, 3]
        assert partly.headers["x-edje-partial"].startswith("4;shard 1")


def test_a_client_that_leaves_takes_its_pairs_out_of_the_shards(
    tiny_engine: Path, stores: list[Path]
):
    with silent(tiny_engine, stores[2]) as (third, service), routing([third.url]) as router:
        connection = HTTPConnection("127.0.0.1", router.port)
        body = json.dumps({"query": QUERY, "documents": PARTS[2]})
        connection.request("POST", "/rerank", body)
        wait_until(lambda: len(service.asked) == 1)
        assert not service.asked[0][1].done()
        connection.close()
        wait_until(lambda: service.asked[0][1].cancelled())
        assert len(service.asked) == 1, "nobody is left to ask again for"
        wait_until(lambda: router.host.service.load().num_requests == 0)


def test_a_shard_that_has_too_much_to_do_is_believed(
    tiny_engine: Path, stores: list[Path], shards: list[Running], whole: Reranker
):
    with (
        Reranker.open(tiny_engine, store=stores[2], num_threads=1) as reranker,
        running(GivenSettings(opens=lambda: Busy(reranker))) as busy,
    ):
        with routing([shards[0].url], [busy.url]) as router:
            reply = rerank(router, [*PARTS[0], *PARTS[2]], allow_partial=True)
            assert (reply.status, reply.headers["retry-after"]) == (429, "7")
        with routing([busy.url, shards[2].url]) as router:  # another server has time
            for _ in range(4):
                assert sorted(order_of(rerank(router, PARTS[2]))) == [0, 1, 2, 3]
            assert router.metric("edje_shard_retries_total") >= 1


def test_without_a_shard_only_partial_answers_come(shards: list[Running], whole: Reranker):
    with routing([shards[0].url], [CLOSED]) as router:
        assert router.ask("/readyz").status == 503
        assert router.ask("/livez").status == 200
        refused = rerank(router, ["img-0", "img-1"])  # img-1 may be where nobody answers
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert CLOSED[7:] not in refused.body.decode()
        assert order_of(rerank(router, ["img-0", "img-3"])) != []  # the shard is not needed
        partly = rerank(router, ["img-0", "img-1"], allow_partial=True)
        assert order_of(partly) == [0]
        assert partly.json()["meta"]["warnings"] == ["1 id is not ranked: shard 1 is down"]
        by_header = rerank(router, ["img-0", "x"], headers={"x-edje-allow-partial": "true"})
        assert by_header.headers["x-edje-partial"] == "1;shard 1 is down"
    with routing([shards[0].url], [CLOSED], partial=True) as router:
        assert router.ask("/readyz").status == 200
        assert order_of(rerank(router, ["img-0", "img-1"])) == [0]


def test_a_shard_that_ends_is_said_and_comes_back(
    tiny_engine: Path, stores: list[Path], shards: list[Running]
):
    with ExitStack() as stack:
        ending = ExitStack()
        third = ending.enter_context(running(settings_of(tiny_engine, stores[2])))
        router = stack.enter_context(routing([shards[0].url], [third.url]))
        asked = ["img-0", "img-2", "img-5"]
        assert len(order_of(rerank(router, asked))) == 3
        ending.close()
        assert rerank(router, asked).status == 503
        partly = rerank(router, asked, allow_partial=True)
        assert order_of(partly) == [0]
        assert partly.json()["meta"]["warnings"] == ["2 ids are not ranked: shard 1 is down"]
        wait_until(lambda: router.ask("/readyz").status == 503)


def test_a_killed_replica_loses_no_request(
    tiny_engine: Path, stores: list[Path], shards: list[Running], whole: Reranker
):
    asked = [*PARTS[0], *PARTS[2]]
    expected = [hit.index for hit in whole.rank(QUERY, asked)]
    found: list[list[int]] = []
    with (
        serving(tiny_engine, stores[2], "--num-threads", "1") as killed,
        routing([shards[0].url], [killed.url, shards[2].url]) as router,
    ):

        def ask() -> None:
            for _ in range(40):
                found.append(order_of(rerank(router, asked)))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(found) > 20)
        killed.end(signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert found == [expected] * 120
        assert router.metric('edje_shard_requests_total{shard="shard 1",status="200"}') == 120
        wait_until(lambda: router.metric('edje_shard_ready_replicas{shard="shard 1"}') == 1)
        assert router.ask("/readyz").status == 200


def test_shards_of_another_scorer_are_refused(
    tiny_engine: Path, stores: list[Path], shards: list[Running], tmp_path: Path
):
    other = tmp_path / "engine"
    shutil.copytree(tiny_engine, other)
    manifest = json.loads((other / "engine.json").read_text())
    manifest["bundle"]["fingerprint_scorer"] = "f" * 64
    (other / "engine.json").write_text(json.dumps(manifest))
    with (
        running(settings_of(other, stores[2])) as third,
        pytest.raises(EngineError, match="several scorers"),
        routing([shards[0].url], [third.url]),
    ):
        pass


def test_a_shard_that_changes_its_scorer_is_asked_no_more(
    tiny_engine: Path, stores: list[Path], shards: list[Running], tmp_path: Path
):
    changing = tmp_path / "engine"
    shutil.copytree(tiny_engine, changing)
    with (
        running(settings_of(changing, stores[2])) as third,
        routing([shards[0].url], [third.url], every_s=60.0) as router,
    ):
        asked = ["img-0", "img-2"]
        assert len(order_of(rerank(router, asked))) == 2
        manifest = json.loads((changing / "engine.json").read_text())
        manifest["bundle"]["fingerprint_scorer"] = "f" * 64
        (changing / "engine.json").write_text(json.dumps(manifest))
        third.host.reload()
        assert rerank(router, asked).status == 503  # the answer itself shows it
        assert order_of(rerank(router, asked, allow_partial=True)) == [0]


@contextmanager
def silent(engine: Path, store: Path) -> Iterator[tuple[Running, Silent]]:
    """A server that accepts and never answers, and its service."""
    with Reranker.open(engine, store=store, num_threads=1) as reranker:
        made = Silent(reranker)
        with running(GivenSettings(opens=lambda: made)) as server:
            yield server, made
