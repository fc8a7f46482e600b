"""Bodies that no client means: refused with a JSON body that every client reads, never a crash."""

from __future__ import annotations

import json
from http.client import HTTPConnection
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from running_server import Running

ROUTES = (
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/score",
    "/v1/score",
    "/ranking",
    "/v1/ranking",
    "/v1/retrieval/any/reranking",
    "/v2/models/edje/infer",
    "/v2/models/edje/versions/1/infer",
)
PLANNED = {200, 400, 408, 413, 422, 429, 504}
TENSORS = [
    {"name": "QUERY", "datatype": "BYTES", "shape": [1], "data": ["a cat"]},
    {"name": "IDS", "datatype": "BYTES", "shape": [2], "data": ["img-1", "img-2"]},
]
VALID: tuple[dict[str, Any], ...] = (
    {"query": "a cat", "documents": ["img-1", {"text": "img-2"}], "top_n": 1, "model": "m"},
    {"query": "a cat", "texts": ["img-1", "img-2"], "raw_scores": True, "return_text": True},
    {"query": {"text": "a cat"}, "passages": [{"text": "img-1"}], "truncate": "END"},
    {"text_1": "a cat", "text_2": ["img-1"], "use_activation": False},
    {"query": "a cat", "documents": ["img-1"], "top_k": 2, "truncation": True},
    {"query": "a cat", "documents": ["img-1"], "property": ""},
    {"id": "7", "inputs": TENSORS, "outputs": [{"name": "SCORES"}]},
)
FIELDS = sorted({name for body in VALID for name in body} | {"items", "data_1", "parameters"})
TEXT = st.text(max_size=30) | st.sampled_from(
    ["img-1", "edje://img-2", "\u200b", "\x00", "\U0001d54f" * 9]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**40), max_value=10**40),
    st.floats(),
    TEXT,
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(FIELDS) | TEXT, inner, max_size=4)
    ),
    max_leaves=12,
)
FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A body that some client sends, with fields replaced, added, left out or twice."""
    body = dict(draw(st.sampled_from(VALID)))
    for name in draw(st.lists(st.sampled_from(FIELDS), max_size=3)):
        body[name] = draw(VALUES)
    for name in draw(st.lists(st.sampled_from(sorted(body)), max_size=1)):
        del body[name]
    raw = json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if body and draw(st.booleans()):  # a key twice
        name = draw(st.sampled_from(sorted(body)))
        more = json.dumps({name: draw(VALUES)}).encode("utf-8", "surrogatepass")
        raw = raw[:-1] + b"," + more[1:]
    if draw(st.booleans()):  # some bytes
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=3)) + raw[at + draw(st.integers(0, 3)) :]
    return raw


@pytest.fixture(scope="module")
def connection(server: Running):
    made = HTTPConnection("127.0.0.1", server.port, timeout=20)
    yield made
    made.close()


def send(connection: HTTPConnection, path: str, raw: bytes, **headers: str) -> tuple[int, Any]:
    """Send a body; what comes back is planned, JSON, and says nothing of the inside."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("POST", path, raw, {"content-type": "application/json", **named})
    response = connection.getresponse()
    text = response.read()
    assert response.status in PLANNED, (response.status, raw[:300], text[:300])
    assert b"Traceback" not in text
    assert b".py" not in text.replace(b"repr", b"")
    if response.getheader("content-type") == "application/octet-stream":
        return response.status, None
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    if response.status != 200:
        assert set(found) >= {"message", "detail", "error", "error_type"}
    return response.status, found


@pytest.mark.parametrize("path", ROUTES)
@FUZZ
@given(raw=mutated())
@example(raw=b"")
@example(raw=b"null")
@example(raw=b'{"query": "a cat", "documents": ["\\ud800"]}')
@example(raw=b'{"query": "\\ud800", "documents": ["img-1"]}')
@example(raw=b'{"query": "a cat", "documents": [NaN], "top_n": Infinity}')
@example(raw=b'{"query": "a cat", "documents": ["img-1"], "top_n": 1e999}')
@example(raw=b'{"query": "a cat", "documents": ["img-1"], "top_n": ' + b"9" * 5000 + b"}")
@example(raw=b"\xef\xbb\xbf{}")
def test_no_body_breaks_a_route(connection, path, raw):
    assert send(connection, path, raw)[0] in (200, 400, 422)


@pytest.mark.parametrize("path", ROUTES)
@FUZZ
@given(raw=st.binary(max_size=300))
def test_no_bytes_break_a_route(connection, path, raw):
    assert send(connection, path, raw)[0] in (400, 422)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("depth", [10, 300, 900, 1100, 20_000])
@pytest.mark.parametrize(
    ("opens", "closes"),
    [("[", "]"), ('{"content":', "}"), ('{"content":[', "]}"), ('{"document":', "}")],
)
def test_no_depth_breaks_a_route(connection, path, depth, opens, closes):
    deep = opens * depth + '"x"' + closes * depth
    for body in (
        f'{{"query":"a cat","documents":[{deep}]}}',
        f'{{"query":{deep},"texts":["img-1"]}}',
        f'{{"query":"a cat","passages":[{deep}]}}',
        f'{{"text_1":"a cat","text_2":{deep}}}',
        f'{{"inputs":[{{"name":{deep},"datatype":{deep},"shape":{deep},"data":{deep}}}]}}',
    ):
        assert send(connection, path, body.encode())[0] in (400, 422)


@pytest.mark.parametrize("length", ["-1", "1e3", "²", "999999999999", "9" * 5000, "", "0", "7"])
def test_no_header_length_breaks_inference(connection, length):
    raw = json.dumps(VALID[-1]).encode()
    connection.putrequest("POST", "/v2/models/edje/infer")
    connection.putheader("content-length", str(len(raw)))
    connection.putheader("inference-header-content-length", length.encode("latin-1"))
    connection.endheaders(raw)
    response = connection.getresponse()
    assert response.status == 400
    json.loads(response.read())


@FUZZ
@given(
    shape=st.lists(st.integers(-2, 2**70), max_size=12),
    size=st.integers(-5, 2**70) | st.none() | TEXT,
    data=st.binary(max_size=60),
    datatype=st.sampled_from(["BYTES", "INT64", "FP32", "", None, []]),
)
def test_no_tensor_breaks_inference(connection, shape, size, data, datatype):
    tensor = {"name": "IDS", "datatype": datatype, "shape": shape}
    tensor["parameters"] = {"binary_data_size": size}
    head = json.dumps({"inputs": [TENSORS[0], tensor]}).encode()
    length = {"inference_header_content_length": str(len(head))}
    status, found = send(connection, "/v2/models/edje/infer", head + data, **length)
    assert status in (400, 422), found


def test_many_faults_cost_little(connection):
    """A body of nothing but mistakes: a fault that is kept for each would be gigabytes."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many = "0," * 2_000_000 + "0"
    for path, name in (("/rerank", "documents"), ("/rerank", "texts"), ("/ranking", "passages")):
        assert send(connection, path, f'{{"query":"a","{name}":[{many}]}}'.encode())[0] == 422
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown_mb < 300


def test_after_all_that_the_server_answers(server):
    found = server.ask("/rerank", VALID[0])
    assert found.status == 200
    assert server.ask("/readyz").status == 200
    assert not [line for line in server.lines() if line.get("reason") == "bug"]
