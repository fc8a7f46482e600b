"""Samples cut into batches: they fit the profile, keep their order and repeat."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edje.engines.contract import Batch
from edje.engines.manifest import EngineManifest, Profile
from edje.engines.samples import RandomSamples, RankingSample, int8_batch, sample_batches


@pytest.mark.parametrize(
    "profile", [Profile(256, (15, 23, 31, 47, 63)), Profile(5, (20,)), Profile(1, (3, 64))]
)
def test_random_samples_fit_every_profile_and_repeat(built_engines, profile):
    bundle = EngineManifest.read(built_engines["onnxruntime"]).bundle
    first, again = (
        [
            batch
            for sample in RandomSamples(bundle)
            for batch in sample_batches(sample, profile, pad_id=0, sep_id=bundle.text.sep_id)
        ]
        for _ in range(2)
    )
    assert sum(len(batch) for batch in first) == 4 * 32
    for batch, twin in zip(first, again, strict=True):
        assert len(batch) <= profile.max_pairs
        assert batch.text_ids.shape[1] in profile.text_buckets
        assert batch.text_length[0] <= batch.text_ids.shape[1]
        np.testing.assert_array_equal(batch.text_ids, twin.text_ids)
        np.testing.assert_array_equal(batch.visual_tokens, twin.visual_tokens)


def test_a_query_longer_than_every_bucket_keeps_its_sep():
    sample = RankingSample(np.array([101, 5, 6, 7, 102], np.int32), np.zeros((3, 2, 4), np.float16))
    (batch,) = sample_batches(sample, Profile(8, (3, 4)), pad_id=0, sep_id=102)
    assert batch.text_ids.tolist() == [[101, 5, 6, 102]]
    assert batch.text_length.tolist() == [4]
    (whole,) = sample_batches(sample, Profile(8, (3, 8)), pad_id=0, sep_id=102)
    assert whole.text_ids.tolist() == [[101, 5, 6, 7, 102, 0, 0, 0]]


def test_fingerprints_tell_samples_apart(built_engines):
    bundle = EngineManifest.read(built_engines["onnxruntime"]).bundle
    made = [RandomSamples(bundle), RandomSamples(bundle, 3), RandomSamples(bundle, 4, 31)]
    assert len({samples.fingerprint for samples in made}) == 3
    assert RandomSamples(bundle).fingerprint == made[0].fingerprint


@settings(max_examples=50, deadline=None)
@given(arrays(np.float16, (2, 3, 5), elements=st.floats(-65504, 65504, width=16)))
def test_int8_tokens_lie_within_half_a_step_of_the_float16_ones(tokens):
    batch = Batch(np.zeros((1, 4), np.int32), *np.zeros((2, 1), np.int32), tokens)
    found = int8_batch(batch)
    assert (found.visual_tokens.dtype, found.visual_scales.dtype) == (np.int8, np.float16)
    assert found.visual_scales.shape == (2, 3)
    assert (found.visual_scales > 0).all()
    scales = found.visual_scales.astype(np.float32)[:, :, None]
    error = np.abs(found.visual_tokens * scales - tokens.astype(np.float32))
    assert (error <= scales * 0.5001).all()
