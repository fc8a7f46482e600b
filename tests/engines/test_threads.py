"""Libraries are told to start no more threads than the container's CPU quota can feed."""

from __future__ import annotations

from threading import Barrier, get_ident

import numpy as np
import pytest
from onnxruntime import InferenceSession as Session

from edje.engines.contract import OpenOptions
from edje.engines.fidelity import reference_scorer
from edje.engines.registry import open_engine
from edje.errors import EngineError
from edje.machine import whole_cores
from thread_counts import LIBRARYS_CHOICE, pretend_quota, watch_threads


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watch_threads(monkeypatch)


PAIRS = [(0, image) for image in range(12)] * 3
QUOTAS = ((2.5, 3), (1.0, 1), (None, LIBRARYS_CHOICE), (9.0, LIBRARYS_CHOICE))


@pytest.mark.parametrize(("quota", "threads"), QUOTAS)
def test_openvino_starts_the_threads_of_the_quota(
    built_engines, started, monkeypatch, official_pairs, run, quota, threads
):
    pretend_quota(monkeypatch, quota)
    engine = open_engine(built_engines["openvino"])
    scores = run(engine, official_pairs.batch(PAIRS, 15))
    engine.close()
    assert started == [threads]
    np.testing.assert_allclose(scores, official_pairs.expected(PAIRS), atol=1e-3)


@pytest.mark.parametrize(("quota", "threads"), QUOTAS)
def test_onnxruntime_scores_a_part_on_every_thread_of_the_quota(
    built_engines, started, monkeypatch, official_pairs, run, quota, threads
):
    pretend_quota(monkeypatch, quota)
    engine = open_engine(built_engines["onnxruntime"])
    forwards, forward = [], Session.run_with_iobinding

    def watched(session, binding):
        forwards.append(get_ident())
        return forward(session, binding)

    monkeypatch.setattr(Session, "run_with_iobinding", watched)
    pairs = PAIRS[:8]  # what one thread takes in one forward
    scores = run(engine, official_pairs.batch(pairs, 15))
    assert started == [1]
    pairs_a_thread = -(-len(pairs) // (threads or whole_cores()))
    assert len(forwards) == -(-len(pairs) // pairs_a_thread)
    assert forwards.count(get_ident()) == 1
    np.testing.assert_allclose(scores, official_pairs.expected(pairs), atol=1e-3)
    engine.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        run(engine, official_pairs.batch(PAIRS, 15))


def test_the_callers_own_number_and_openvinos_own_setting_win(built_engines, started, monkeypatch):
    pretend_quota(monkeypatch, 2.0)
    own = OpenOptions(backend_settings={"INFERENCE_NUM_THREADS": "1"})
    for backend, options in (
        ("onnxruntime", OpenOptions(num_threads=1)),
        ("openvino", OpenOptions(num_threads=1)),
        ("openvino", own),
    ):
        open_engine(built_engines[backend], options).close()
    assert started == [1, 1, 1]


def test_the_float32_reference_scores_a_part_on_every_thread_of_the_quota(
    tiny_bundle, started, monkeypatch, official_pairs
):
    pretend_quota(monkeypatch, 2.0)
    score = reference_scorer(tiny_bundle)
    assert started == [1]
    forwards, forward = [], Session.run
    meeting = Barrier(2)  # one thread alone would wait here for ever

    def watched(session, *arguments):
        forwards.append(get_ident())
        meeting.wait(timeout=60)
        return forward(session, *arguments)

    monkeypatch.setattr(Session, "run", watched)
    scores = score(official_pairs.batch(PAIRS, 15))
    assert len(set(forwards)) == 2
    assert len(forwards) == 6  # of 36 pairs, 8 at most on a thread
    np.testing.assert_allclose(scores, official_pairs.expected(PAIRS), atol=1e-3)
