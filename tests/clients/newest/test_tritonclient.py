"""Triton's HTTP client, JSON and binary tensors."""

from __future__ import annotations

import numpy as np
import pytest
import tritonclient.http as triton
from cases import KEY, UNKNOWN, Case
from tritonclient.utils import InferenceServerException

from busy_server import until_raised


def client(url: str) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(url.removeprefix("http://"))


def inputs(query: str, ids: list[str], binary: bool) -> list[triton.InferInput]:
    made = []
    for name, texts in {"QUERY": [query], "IDS": ids}.items():
        tensor = triton.InferInput(name, [len(texts)], "BYTES")
        values = np.array([text.encode() for text in texts], np.object_)
        made.append(tensor.set_data_from_numpy(values, binary_data=binary))
    return made


@pytest.mark.parametrize("binary", [True, False])
def test_scores_in_the_order_sent(binary: bool, url: str, case: Case) -> None:
    wanted = [triton.InferRequestedOutput("SCORES", binary_data=binary)]
    answer = client(url).infer("edje", inputs(case.query, case.ids, binary), outputs=wanted)
    scores = answer.as_numpy("SCORES")
    assert np.argsort(-scores, kind="stable").tolist() == case.order
    np.testing.assert_allclose(scores[case.order], case.logits, rtol=1e-3, atol=1e-3)


def test_health(url: str) -> None:
    asked = client(url)
    assert asked.is_server_live()
    assert asked.is_server_ready()
    assert asked.is_model_ready("edje")
    assert not asked.is_model_ready("another")


def test_errors(url: str, locked: str, overloaded: str, one_case: Case) -> None:
    def status(where: str, ids: list[str], **headers: str) -> str:
        with pytest.raises(InferenceServerException) as raised:
            client(where).infer("edje", inputs(one_case.query, ids, True), headers=headers)
        return str(raised.value.status())

    assert status(url, [UNKNOWN]) == "422"
    assert status(locked, one_case.ids, Authorization="Bearer wrong") == "401"
    asked = inputs(one_case.query, one_case.ids, True)
    assert client(locked).infer("edje", asked, headers={"Authorization": f"Bearer {KEY}"})
    late = client(overloaded)
    refused = until_raised(lambda: late.infer("edje", asked), InferenceServerException)
    assert refused.status() == "429"
