"""The float32 engines against the scores that the official code computed."""

import numpy as np
import pytest

NUM_CAPTIONS, NUM_IMAGES = 5, 12
TOLERANCE = 1e-4
EVERY_PAIR = [(caption, image) for caption in range(NUM_CAPTIONS) for image in range(NUM_IMAGES)]


def assert_parity(engine, run, official_pairs, pairs, bucket):
    scores = run(engine, official_pairs.batch(pairs, bucket))
    np.testing.assert_allclose(scores, official_pairs.expected(pairs), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("bucket", [15, 23, 31, 47, 63])
def test_a_caption_alone_in_every_bucket_that_holds_it(engine, run, official_pairs, bucket):
    assert engine.manifest.profile.text_buckets == (15, 23, 31, 47, 63)
    for caption, ids in enumerate(official_pairs.caption_ids):
        if len(ids) <= bucket:
            pairs = [(caption, image) for image in range(NUM_IMAGES)]
            assert_parity(engine, run, official_pairs, pairs, bucket)


def test_pairs_of_several_queries_in_any_order(engine, run, official_pairs):
    random = np.random.default_rng(7)
    for num_pairs in (len(EVERY_PAIR), 23, 23, 23):
        order = random.permutation(len(EVERY_PAIR))[:num_pairs]
        assert_parity(engine, run, official_pairs, [EVERY_PAIR[i] for i in order], 63)


def test_every_batch_size(engine, run, official_pairs):
    short = [pair for pair in EVERY_PAIR if len(official_pairs.caption_ids[pair[0]]) <= 23]
    for num_pairs in range(1, 18):
        pairs = [short[(7 * i) % len(short)] for i in range(num_pairs)]
        assert_parity(engine, run, official_pairs, pairs, 23)


def test_shapes_may_change_from_batch_to_batch(engine, run, official_pairs):
    for bucket, num_pairs in [(63, 17), (23, 1), (47, 12), (23, 17), (63, 3)]:
        pairs = [(0, image % NUM_IMAGES) for image in range(num_pairs)]
        assert_parity(engine, run, official_pairs, pairs, bucket)


def test_padding_does_not_matter_and_inputs_stay_as_they_were(engine, run, official_pairs):
    batch = official_pairs.batch([(0, 0), (0, 1)], 31)
    clean = run(engine, batch)
    batch.text_ids[:, batch.text_length[0] :] = 99
    before = [batch.text_ids.copy(), batch.visual_tokens.copy()]
    np.testing.assert_allclose(run(engine, batch), clean, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(batch.text_ids, before[0])
    np.testing.assert_array_equal(batch.visual_tokens, before[1])
