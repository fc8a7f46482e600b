"""Every fault of a batch is named, all at once, before anything runs."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.arrays import even_parts
from edje.engines.contract import OpenOptions, shape_faults, value_faults
from edje.engines.fidelity import InlineStream
from edje.engines.registry import open_engine
from edje.errors import EngineError


@pytest.fixture
def batch(official_pairs):
    return official_pairs.batch([(0, 0), (1, 1), (0, 2)], 15)


def scores_for(batch):
    return np.zeros(len(batch), np.float32)


def test_all_shape_faults_come_at_once(engine, batch):
    wrong = replace(
        batch,
        text_ids=np.zeros((2, 17), np.int64),
        text_length=np.zeros(3, np.int32),
        visual_tokens=np.zeros((3, 8, 4), np.float32),
        visual_scales=np.zeros((3, 8), np.float16),
    )
    with pytest.raises(EngineError, match="does not fit the engine") as caught:
        engine.enqueue(wrong, np.zeros(2, np.float32), stream=InlineStream())
    text = str(caught.value)
    assert "text_ids: got int64 [2, 17], expected int32 [2, 17]" in text
    assert "text_length: got int32 [3], expected int32 [2]" in text
    assert "visual_tokens: got float32 [3, 8, 4], expected float16 [3, 64, 32]" in text
    assert "visual_scales: got an array, float16 has none" in text
    assert "scores: got float32 [2], expected float32 [3]" in text
    assert "text slots: got 17, expected one of [15, 23, 31, 47, 63]" in text


def test_too_many_pairs_and_none(engine, official_pairs, run):
    most = engine.manifest.profile.max_pairs
    with pytest.raises(EngineError, match=f"pairs: got {most + 1}, expected 1 to {most}"):
        run(engine, official_pairs.batch([(0, 0)] * (most + 1), 15))
    none = replace(
        official_pairs.batch([(0, 0)], 15),
        query_of_pair=np.zeros(0, np.int32),
        visual_tokens=np.zeros((0, 64, 32), np.float16),
    )
    with pytest.raises(EngineError, match="pairs: got 0"):
        run(engine, none)


def test_arrays_of_another_rank_strided_and_read_only_ones(engine, batch, run):
    with pytest.raises(EngineError, match=r"expected \[Q, T\] and \[P\]"):
        run(engine, replace(batch, text_ids=batch.text_ids[0]))
    wide = np.zeros((3, 64, 64), np.float16)
    scores = scores_for(batch)
    scores.flags.writeable = False
    faults = shape_faults(replace(batch, visual_tokens=wide[:, :, ::2]), scores, engine.manifest)
    assert any("not C-contiguous" in fault for fault in faults)
    assert "scores: got a read-only array" in faults


def test_int8_tokens_need_scales(engine, batch):
    manifest = replace(engine.manifest, token_dtype="int8")
    stored = replace(batch, visual_tokens=batch.visual_tokens.astype(np.int8))
    scores = scores_for(batch)
    assert shape_faults(stored, scores, manifest) == [
        "visual_scales: got none, int8 tokens need float16 [P, m]"
    ]
    scaled = replace(stored, visual_scales=np.ones((3, 64), np.float16))
    assert shape_faults(scaled, scores, manifest) == []


def test_rows_are_for_engines_that_read_by_row(engine, batch):
    scores, tokens = scores_for(batch), np.zeros((5, 64, 32), np.float16)
    by_row = replace(batch, visual_tokens=tokens, rows=np.zeros(3, np.int32))
    (fault,) = shape_faults(by_row, scores, engine.manifest)
    assert "this engine reads the tokens of every pair in their order" in fault
    assert shape_faults(by_row, scores, engine.manifest, reads_rows=True) == []
    assert by_row.part(slice(1, 3)).visual_tokens is tokens
    assert len(by_row.part(slice(1, 3)).rows) == 2
    wrong = replace(by_row, rows=np.zeros(4, np.int32), fresh=(tokens[:, :3], None))
    assert shape_faults(wrong, scores, engine.manifest, reads_rows=True) == [
        "rows: got int32 [4], expected int32 [3]",
        "fresh: got float16 [5, 3, 32], not C-contiguous, expected float16 [5, 64, 32]",
    ]


def test_all_values_out_of_range_come_at_once(engine, batch, run):
    assert value_faults(batch, engine.manifest) == []
    vocab_size = engine.manifest.bundle.sizes.vocab_size
    batch.text_ids[0, 1] = vocab_size
    batch.text_length[1] = 17
    batch.query_of_pair[2] = -1
    with pytest.raises(EngineError) as caught:
        run(engine, batch)
    text = str(caught.value)
    assert f"text_ids: got values from 0 to {vocab_size}, expected 0 to {vocab_size - 1}" in text
    assert "to 17, expected 2 to 15" in text
    assert "query_of_pair: got values from -1 to 1, expected 0 to 1" in text


def test_many_threads_may_run_one_engine(engine, official_pairs, run):
    pairs = [(caption, image) for caption in range(5) for image in range(12)]
    batch, expected = official_pairs.batch(pairs, 63), official_pairs.expected(pairs)
    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(lambda _: run(engine, batch), range(12)):
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


def test_non_finite_tokens_spoil_their_own_pair_only(engine, official_pairs, run):
    pairs = [(0, 0), (0, 1), (0, 2)]
    batch = official_pairs.batch(pairs, 15)
    batch.visual_tokens[1, 3, 5] = np.nan
    scores = run(engine, batch)
    expected = official_pairs.expected(pairs)
    assert np.isnan(scores[1])
    np.testing.assert_allclose(scores[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-4)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_parts_cover_every_pair_once_and_evenly(num_pairs, most):
    parts = list(even_parts(num_pairs, most))
    sizes = [part.stop - part.start for part in parts]
    assert [place for part in parts for place in range(num_pairs)[part]] == list(range(num_pairs))
    assert len(parts) == -(-num_pairs // most)
    assert max(sizes) - min(sizes) <= 1


def test_a_large_batch_runs_in_parts_and_a_closed_engine_says_so(
    built_engines, official_pairs, run
):
    pairs = [(caption, image) for caption in range(5) for image in range(12)]
    batch, expected = official_pairs.batch(pairs, 63), official_pairs.expected(pairs)
    for folder in built_engines.values():
        engine = open_engine(folder, OpenOptions(num_threads=1))  # 16 pairs a forward
        np.testing.assert_allclose(run(engine, batch), expected, rtol=0, atol=1e-4)
        engine.close()
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            run(engine, batch)
