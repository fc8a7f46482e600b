"""The hot routes over a real server: every route answers, refuses, counts and logs."""

from __future__ import annotations

import json
from http.client import HTTPConnection

import pytest

from running_server import Running, running, settings_of

IDS = [f"img-{number}" for number in range(12)]
RERANK = {"query": "a red circle", "documents": IDS}
PASSAGES = {"query": {"text": "a red circle"}, "passages": [{"text": name} for name in IDS]}


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_every_rerank_route_returns_what_rank_returns(server: Running, path):
    expected = server.host.service.reranker.rank("a red circle", IDS)
    reply = server.ask(path, RERANK)
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    assert [r["index"] for r in reply.json()["results"]] == [hit.index for hit in expected]


@pytest.mark.parametrize(
    "path", ["/ranking", "/v1/ranking", "/v1/retrieval/nvidia/some-model/reranking"]
)
def test_every_nvidia_route_returns_logits(server: Running, path):
    expected = server.host.service.reranker.rank("a red circle", IDS)
    rankings = server.ask(path, PASSAGES).json()["rankings"]
    assert [r["index"] for r in rankings] == [hit.index for hit in expected]
    assert [r["logit"] for r in rankings] == pytest.approx([h.score for h in expected], abs=1e-5)


def test_an_answer_says_where_its_time_went_and_who_asked(server: Running):
    reply = server.ask("/rerank", RERANK, headers={"x-request-id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    stages = dict(part.strip().split(";dur=") for part in reply.headers["server-timing"].split(","))
    assert set(stages) == {
        *("tokenize", "resolve", "queue", "read", "upload", "compute", "download", "total")
    }
    assert 0 < float(stages["compute"]) < float(stages["total"])


def test_a_request_id_that_could_break_a_log_or_a_header_is_replaced(server: Running):
    assert (
        server.ask("/rerank", RERANK, headers={"x-request-id": "a b"})
        .headers["x-request-id"]
        .startswith("rr-")
    )


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        ([], 422),
        ({}, 422),
        ({**RERANK, "documents": []}, 422),
        ({**RERANK, "documents": [*IDS, "nope"]}, 422),
        ({**RERANK, "query": " "}, 422),
        ({**RERANK, "top_n": -1}, 422),
    ],
)
def test_a_refusal_has_one_body_that_every_client_reads(server: Running, body, status):
    reply = server.ask("/rerank", body)
    assert reply.status == status
    told = reply.json()
    assert told["message"] == told["error"]["message"]
    assert told["error"]["code"] == status
    assert told["detail"] == told["message"] if status == 400 else told["detail"][0]["msg"]
    assert "/" not in told["message"].replace("edje://", "")


def test_voyages_detail_is_a_sentence(server: Running):
    """Its client makes text of it, and a list would break that."""
    reply = server.ask("/v1/rerank", {**RERANK, "documents": ["nope"], "truncation": True})
    assert reply.status == 422
    assert reply.json()["detail"] == "1 id is not in the store: 'nope'"
    assert reply.json()["error"] == reply.json()["detail"]


def test_teis_error_is_a_sentence(server: Running):
    reply = server.ask("/rerank", {"query": "red", "texts": ["nope"]})
    assert reply.status == 422
    assert reply.json()["error"] == "1 id is not in the store: 'nope'"
    assert reply.json()["error_type"] == "validation"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_other_methods_are_refused_with_what_is_allowed(server: Running, method):
    reply = server.ask("/rerank", method=method)
    assert reply.status == 405
    assert reply.headers["allow"] == "POST"


def test_a_path_that_is_not_there(server: Running):
    assert server.ask("/v3/rerank", RERANK).status == 404
    assert server.ask("/v3/rerank", RERANK).json()["message"]


def test_a_deadline_by_header(server: Running):
    ask = {"headers": {"x-request-timeout-ms": "0"}}
    assert server.ask("/rerank", RERANK, **ask).status == 400
    assert server.ask("/rerank", RERANK, headers={"x-request-timeout-ms": "5000"}).status == 200


def test_a_large_body_is_read_aside_and_answered(server: Running):
    many = IDS * 4000
    reply = server.ask("/rerank", {**RERANK, "documents": many, "top_n": 3}, timeout=60)
    assert len(reply.json()["results"]) == 3


def test_a_body_that_is_too_large(tiny_engine, tiny_store):
    with running(settings_of(tiny_engine, tiny_store, max_body_bytes=2000)) as server:
        reply = server.ask("/rerank", {**RERANK, "documents": IDS * 100})
        assert reply.status == 413
        assert server.ask("/rerank", RERANK).status == 200


def test_a_body_in_pieces_without_a_length(server: Running):
    connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
    raw = json.dumps(RERANK).encode()
    pieces = (raw[at : at + 7] for at in range(0, len(raw), 7))
    headers = {"transfer-encoding": "chunked"}
    connection.request("POST", "/rerank", pieces, headers, encode_chunked=True)
    assert len(json.loads(connection.getresponse().read())["results"]) == len(IDS)
    connection.close()


def test_keys(tiny_engine, tiny_store):
    settings = settings_of(tiny_engine, tiny_store, keys=("s3cret", "other"), max_pairs_per_key=5)
    with running(settings) as server:
        bearer, bare = {"authorization": "Bearer s3cret"}, {"authorization": "other"}
        for path, body in {"/rerank": RERANK, "/v1/models": None, "/info": None}.items():
            assert server.ask(path, body).status == 401
            assert server.ask(path, body, headers={"authorization": "Bearer no"}).status == 401
            assert server.ask(path, body, headers=bearer).status == 200
            assert server.ask(path, body, headers=bare).status == 200
        refused = server.ask("/rerank", RERANK)
        assert refused.headers["www-authenticate"] == "Bearer"
        assert "s3cret" not in refused.body.decode()
        for path in ("/livez", "/readyz", "/healthz", "/health", "/ping", "/metrics"):
            assert server.ask(path).status == 200, "probes and Prometheus have no key"


def test_unknown_ids_rank_last_where_the_operator_says_so(tiny_engine, tiny_store):
    """Dify tests a reranker with three English sentences."""
    from edje.runtime.server import ServiceOptions

    settings = settings_of(tiny_engine, tiny_store, service=ServiceOptions(unknown="lowest"))
    with running(settings) as server:
        documents = ["Organic skincare products", "img-1", "Technical jargon"]
        reply = server.ask("/rerank", {"query": "red", "documents": documents, "top_n": 3})
        results = reply.json()["results"]
        assert [result["index"] for result in results] == [1, 0, 2]
        assert [result["relevance_score"] for result in results[1:]] == [0.0, 0.0]
        assert reply.headers["x-edje-missing"].startswith("2;Organic%20skincare")
        assert server.metric("edje_unknown_ids_total") == 2


def test_what_is_counted_and_logged(tiny_engine, tiny_store):
    with running(settings_of(tiny_engine, tiny_store)) as server:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        server.ask("/rerank", RERANK, headers={"traceparent": trace, "x-request-id": "one"})
        server.ask("/rerank", {"query": "a secret", "texts": ["nope"]})
        assert server.metric('edje_requests_total{dialect="cohere",status="200"}') == 1
        assert server.metric('edje_requests_total{dialect="tei",status="422"}') == 1
        assert server.metric('edje_refusals_total{reason="unknown_ids"}') == 1
        assert server.metric("edje_pairs_total") >= len(IDS)
        assert server.metric('edje_stage_seconds_count{stage="tokenize"}') == 1
        assert server.metric("edje_ready") == 1
        assert server.metric('edje_engine_info{backend="openvino"') == 1
        first, second = (line for line in server.lines() if line["event"] == "request")
        assert (first["id"], first["traceparent"], first["pairs"]) == ("one", trace, len(IDS))
        assert (second["status"], second["reason"]) == (422, "unknown_ids")
        assert b"secret" not in server.log.getvalue()


def test_queries_are_logged_only_when_asked_for(tiny_engine, tiny_store):
    with running(settings_of(tiny_engine, tiny_store, log_queries=True)) as server:
        server.ask("/rerank", RERANK)
        server.ask("/livez")
        assert [line["query"] for line in server.lines()] == ["a red circle"]


def test_the_api_document_names_every_hot_route(server: Running):
    document = server.ask("/openapi.json").json()
    for path in ("/rerank", "/v2/rerank", "/v1/ranking", "/score", "/v2/models/edje/infer"):
        assert "post" in document["paths"][path]
    assert "429" in document["paths"]["/rerank"]["post"]["responses"]
    assert server.ask("/docs").status == 200


def test_what_runs(server: Running):
    info = server.ask("/info").json()
    assert info["score_type"] == "sigmoid"
    assert info["num_images"] == len(IDS)
    assert server.ask("/v1/models").json()["data"][0]["id"] == "edje"
