"""The clients that people use most, unchanged, against a server on loopback: order and errors.

More of them, in environments of their own: `make test-clients`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from cohere.core.request_options import RequestOptions
from tritonclient.utils import InferenceServerException

from busy_server import busy, until_raised
from edje import Reranker
from edje.runtime.results import Hit
from edje.runtime.server import ServiceOptions
from edje.runtime.store import TokenStore
from running_server import Running, running, settings_of

QUERY = "a dog on a beach"
IDS = [f"img-{i}" for i in (7, 2, 11, 0, 5, 9)]
KEY = "a-key"
MODEL = "edje"
ONCE = RequestOptions(max_retries=0)


@pytest.fixture(scope="module")
def expected(tiny_engine: Path, tiny_store: Path) -> tuple[Hit, ...]:
    """The ranking that `Reranker.rank` gives, without any server."""
    with Reranker.open(tiny_engine, store=tiny_store) as reranker:
        return reranker.rank(QUERY, IDS).hits


@pytest.fixture(scope="module")
def locked(tiny_engine: Path, tiny_store: Path) -> Iterator[Running]:
    """A server that wants a key."""
    with running(settings_of(tiny_engine, tiny_store, keys=[KEY])) as started:
        yield started


@pytest.fixture(scope="module")
def overloaded(tiny_engine: Path, tiny_store: Path, tmp_path_factory: Any) -> Iterator[Running]:
    """A server that refuses whatever would wait, kept at work on 2,000 images, one a batch."""
    folder = tmp_path_factory.mktemp("many") / "store"
    names = [f"img-{i}" for i in range(2000)]
    with TokenStore.open(tiny_store) as few:
        num_tokens, hidden = few.record_shape
        encoder = few.fingerprint_encoder
    tokens = np.ones((len(names), num_tokens, hidden), np.float16)
    with TokenStore.create(
        folder, num_tokens=num_tokens, hidden=hidden, fingerprint_encoder=encoder
    ) as many:
        many.append(names, tokens)
    options = ServiceOptions(max_wait_s=0.0, max_batch_pairs=1)
    with running(settings_of(tiny_engine, folder, service=options)) as started:
        body = {"query": QUERY, "documents": names}
        with busy(lambda: started.ask("/rerank", body).status):
            yield started


def same(found: list[tuple[int, float]], expected: tuple[Hit, ...], *, logits: bool) -> None:
    """Hold that positions and scores are those of `Reranker.rank`."""
    assert [index for index, _ in found] == [hit.index for hit in expected]
    raw = np.array([hit.score for hit in expected])
    scores = raw if logits else 1 / (1 + np.exp(-raw))
    np.testing.assert_allclose([score for _, score in found], scores, rtol=1e-4)


def rank_v1(url: str, documents: list[Any], key: str = "none", **more: Any) -> Any:
    with cohere.Client(api_key=key, base_url=url) as client:
        return client.rerank(model=MODEL, query=QUERY, documents=documents, **more)


def rank_v2(url: str, documents: list[Any], key: str = "none", **more: Any) -> Any:
    with cohere.ClientV2(api_key=key, base_url=url) as client:
        return client.rerank(model=MODEL, query=QUERY, documents=documents, **more)


both = pytest.mark.parametrize("rank", [rank_v1, rank_v2])


@both
def test_cohere_ranks(rank: Callable[..., Any], server: Running, expected):
    answer = rank(server.url, IDS)
    found = [(one.index, one.relevance_score) for one in answer.results]
    same(found, expected, logits=False)
    assert answer.meta.api_version.version == "2"
    assert answer.meta.billed_units.search_units == 1


@both
def test_cohere_cuts_to_top_n(rank: Callable[..., Any], server: Running, expected):
    answer = rank(server.url, IDS, top_n=2)
    assert [one.index for one in answer.results] == [hit.index for hit in expected[:2]]


def test_cohere_v1_takes_documents_of_fields_and_gets_them_back(server: Running, expected):
    answer = rank_v1(server.url, [{"text": name} for name in IDS], return_documents=True)
    assert [one.document.text for one in answer.results] == [hit.id for hit in expected]


@both
@pytest.mark.parametrize(
    ("documents", "says"),
    [
        (["img-0", "no-such"], "'no-such' is not in the store"),
        ([], "expected one id or more"),
    ],
)
def test_cohere_says_what_is_wrong(rank, documents, says, server: Running):
    with pytest.raises(cohere.UnprocessableEntityError) as raised:
        rank(server.url, documents)
    assert says in str(raised.value)


@both
def test_cohere_is_let_in_with_the_key_alone(rank: Callable[..., Any], locked: Running):
    assert len(rank(locked.url, IDS, KEY).results) == len(IDS)
    with pytest.raises(cohere.UnauthorizedError, match="the API key is not known"):
        rank(locked.url, IDS, "another")


@both
def test_cohere_learns_of_overload_and_when_to_come_back(rank, overloaded: Running):
    refused = until_raised(
        lambda: rank(overloaded.url, ["img-1"], request_options=ONCE),
        cohere.TooManyRequestsError,
    )
    assert refused.headers is not None
    assert int(refused.headers["retry-after"]) >= 1


def test_tei_s_clients_read_a_sorted_array(server: Running, expected):
    body = {"query": QUERY, "texts": IDS, "raw_scores": False, "return_text": True}
    answer = httpx.post(f"{server.url}/rerank", json={**body, "truncate": True}).json()
    same([(one["index"], one["score"]) for one in answer], expected, logits=False)
    assert [one["text"] for one in answer] == [hit.id for hit in expected]
    raw = httpx.post(f"{server.url}/rerank", json={**body, "raw_scores": True}).json()
    same([(one["index"], one["score"]) for one in raw], expected, logits=True)


def test_tei_s_clients_read_errors_as_a_sentence_and_a_kind(server: Running, locked: Running):
    refused = httpx.post(f"{server.url}/rerank", json={"query": QUERY, "texts": ["no-such"]})
    assert refused.status_code == 422
    assert "'no-such'" in refused.json()["error"]
    assert refused.json()["error_type"] == "validation"
    body = {"query": QUERY, "texts": IDS}
    bare = {"authorization": KEY}  # LlamaIndex sends the key without `Bearer`
    assert httpx.post(f"{locked.url}/rerank", json=body, headers=bare).status_code == 200
    assert httpx.post(f"{locked.url}/rerank", json=body).status_code == 401


def bytes_input(name: str, texts: list[str], binary: bool) -> triton.InferInput:
    tensor = triton.InferInput(name, [len(texts)], "BYTES")
    values: Any = np.array([text.encode() for text in texts], np.object_)
    return tensor.set_data_from_numpy(values, binary_data=binary)


def rows_input(rows: np.ndarray, binary: bool) -> triton.InferInput:
    tensor = triton.InferInput("ROWS", [len(rows)], "INT64")
    return tensor.set_data_from_numpy(rows.astype(np.int64), binary_data=binary)


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[triton.InferenceServerClient]:
    made = triton.InferenceServerClient(server.url.removeprefix("http://"))
    yield made
    made.close()


def in_order_sent(expected: tuple[Hit, ...]) -> list[float]:
    return [hit.score for hit in sorted(expected, key=lambda hit: hit.index)]


@pytest.mark.parametrize("binary", [True, False])
def test_triton_scores_ids(binary: bool, client: triton.InferenceServerClient, expected):
    inputs = [bytes_input("QUERY", [QUERY], binary), bytes_input("IDS", IDS, binary)]
    wanted = [triton.InferRequestedOutput("SCORES", binary_data=binary)]
    result = client.infer(MODEL, inputs, outputs=wanted, request_id="seven")
    scores = result.as_numpy("SCORES")
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, in_order_sent(expected), rtol=1e-5)
    assert result.get_response()["id"] == "seven"


@pytest.mark.parametrize("binary", [True, False])
def test_triton_scores_rows(binary: bool, client, tiny_store: Path, expected):
    with TokenStore.open(tiny_store) as store:
        rows = store.rows(IDS)
    inputs = [bytes_input("QUERY", [QUERY], binary), rows_input(rows, binary)]
    scores = client.infer(MODEL, inputs).as_numpy("SCORES")
    np.testing.assert_allclose(scores, in_order_sent(expected), rtol=1e-5)


def test_triton_asks_how_the_server_is(client: triton.InferenceServerClient):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready("another")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata(MODEL)
    assert {one["name"] for one in metadata["inputs"]} == {"QUERY", "IDS", "ROWS"}
    assert metadata["outputs"] == [{"name": "SCORES", "datatype": "FP32", "shape": [-1]}]
    assert client.get_model_config(MODEL)["name"] == MODEL


def test_triton_raises_its_exception_with_the_status(client, locked: Running, overloaded: Running):
    query = bytes_input("QUERY", [QUERY], True)
    with pytest.raises(InferenceServerException, match="not in the store: 'no-such'") as raised:
        client.infer(MODEL, [query, bytes_input("IDS", ["no-such"], True)])
    assert raised.value.status() == "422"
    with pytest.raises(InferenceServerException, match="not in the store: 'row 4096'"):
        client.infer(MODEL, [query, rows_input(np.array([4096]), True)])
    with pytest.raises(InferenceServerException) as unknown:
        client.infer("another", [query, bytes_input("IDS", IDS, True)])
    assert unknown.value.status() == "404"
    with pytest.raises(InferenceServerException, match="there is no model 'another' here"):
        client.get_model_metadata("another")
    asked = [query, bytes_input("IDS", ["img-0"], True)]
    keyless = triton.InferenceServerClient(locked.url.removeprefix("http://"))
    with pytest.raises(InferenceServerException, match="an API key is needed") as refused:
        keyless.infer(MODEL, asked)
    assert refused.value.status() == "401"
    with pytest.raises(InferenceServerException, match="an API key is needed"):
        keyless.get_server_metadata()
    assert keyless.infer(MODEL, asked, headers={"Authorization": f"Bearer {KEY}"}) is not None
    keyless.close()
    late = triton.InferenceServerClient(overloaded.url.removeprefix("http://"))
    too_much = until_raised(lambda: late.infer(MODEL, asked), InferenceServerException)
    assert too_much.status() == "429"
    late.close()
