"""Samples cut into batches: they fit the profile, keep their order and repeat."""

import numpy as np
import pytest

from edje.engines.manifest import EngineManifest, Profile
from edje.engines.samples import RandomSamples, RankingSample, sample_batches


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
    made = [RandomSamples(bundle), RandomSamples(bundle, 3), RandomSamples(bundle, 4, 31)]
    assert len({samples.fingerprint for samples in made}) == 3
    assert RandomSamples(bundle).fingerprint == made[0].fingerprint
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
