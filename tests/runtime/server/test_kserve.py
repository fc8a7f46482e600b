"""KServe's protocol: JSON and binary tensors give the same scores; nothing malformed passes."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.runtime.server.kserve import HEADER_LENGTH, read_infer
from edje.runtime.server.refusals import Refusal
from running_server import Running

INFER = "/v2/models/edje/infer"
IDS = ["img-0", "img-3", "img-7"]


def bytes_tensor(texts: list[str]) -> bytes:
    return b"".join(struct.pack("<I", len(t.encode())) + t.encode() for t in texts)


def as_json(query: str, ids: list[str]) -> dict:
    return {
        "id": "a",
        "inputs": [
            {"name": "QUERY", "datatype": "BYTES", "shape": [1], "data": [query]},
            {"name": "IDS", "datatype": "BYTES", "shape": [len(ids)], "data": ids},
        ],
    }


def as_binary(query: str, name: str, datatype: str, number: int, part: bytes) -> tuple[bytes, dict]:
    first = bytes_tensor([query])
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "QUERY",
                    "datatype": "BYTES",
                    "shape": [1],
                    "parameters": {"binary_data_size": len(first)},
                },
                {
                    "name": name,
                    "datatype": datatype,
                    "shape": [number],
                    "parameters": {"binary_data_size": len(part)},
                },
            ],
            "outputs": [{"name": "SCORES", "parameters": {"binary_data": True}}],
        }
    ).encode()
    return head + first + part, {HEADER_LENGTH: str(len(head))}


def binary_scores(reply) -> np.ndarray:
    length = int(reply.headers[HEADER_LENGTH])
    head = json.loads(reply.body[:length])
    assert head["outputs"][0]["parameters"]["binary_data_size"] == len(reply.body) - length
    return np.frombuffer(reply.body[length:], "<f4")


def test_json_ids_binary_ids_and_binary_rows_score_the_same(server: Running):
    expected = {hit.id: hit.score for hit in server.host.service.reranker.rank("red", IDS)}
    reply = server.ask(INFER, as_json("red", IDS))
    (output,) = reply.json()["outputs"]
    assert reply.json()["id"] == "a"
    assert output["data"] == pytest.approx([expected[name] for name in IDS], abs=1e-5)
    raw, headers = as_binary("red", "IDS", "BYTES", 3, bytes_tensor(IDS))
    by_id = binary_scores(server.ask(INFER, raw, headers=headers))
    assert by_id.tolist() == output["data"]
    rows = server.host.service.reranker.store.rows(IDS)
    raw, headers = as_binary("red", "ROWS", "INT64", 3, rows.astype("<i8").tobytes())
    by_row = binary_scores(server.ask(INFER, raw, headers=headers))
    assert by_row.tolist() == output["data"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"inputs": None}, "no list of tensors"),
        ({"inputs": [5]}, "no list of tensors"),
        ({"inputs": []}, "QUERY"),
        ({"inputs": [{"name": "QUERY", "datatype": "BYTES", "shape": [1]}]}, "no list of 1"),
        (
            {"inputs": [{"name": "QUERY", "datatype": "FP32", "shape": [1], "data": [1]}]},
            "expected BYTES or INT64",
        ),
        (
            {"inputs": [{"name": "QUERY", "datatype": "BYTES", "shape": [-1], "data": ["q"]}]},
            "its shape is",
        ),
    ],
)
def test_tensors_that_cannot_be_meant(change, fault):
    with pytest.raises(Refusal, match=fault):
        read_infer(json.dumps({**as_json("q", IDS), **change}).encode(), None)


def test_ids_or_rows_but_not_both():
    body = as_json("q", IDS)
    body["inputs"].append({"name": "ROWS", "datatype": "INT64", "shape": [1], "data": [1]})
    with pytest.raises(Refusal, match="IDS BYTES"):
        read_infer(json.dumps(body).encode(), None)


def test_an_error_is_a_sentence_as_its_clients_read_it(server: Running):
    reply = server.ask(INFER, as_json("red", ["nope"]))
    assert reply.status == 422
    assert reply.json()["error"] == "1 id is not in the store: 'nope'"


@given(data=st.data())
def test_binary_bodies_cut_or_changed_anywhere_are_read_or_refused(data):
    raw, headers = as_binary("red", "IDS", "BYTES", 3, bytes_tensor(IDS))
    cut = data.draw(st.integers(0, len(raw)))
    changed = bytearray(raw[:cut])
    for _ in range(data.draw(st.integers(0, 3))):
        if changed:
            at = data.draw(st.integers(0, len(changed) - 1))
            changed[at] = data.draw(st.integers(0, 255))
    refused = None
    try:
        assert isinstance(read_infer(bytes(changed), headers[HEADER_LENGTH]).query, str)
    except Refusal as refusal:
        refused = refusal
    assert refused is None or refused.status in (400, 422)


def test_what_the_server_says_of_the_model(server: Running):
    model = server.ask("/v2/models/edje").json()
    assert {tensor["name"] for tensor in model["inputs"]} == {"QUERY", "IDS", "ROWS"}
    assert server.ask("/v2/models/edje/ready").status == 200
    assert server.ask("/v2/models/other/ready").status == 404
    assert server.ask("/v2/health/live").status == server.ask("/v2/health/ready").status == 200
