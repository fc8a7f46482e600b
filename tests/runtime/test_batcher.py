"""Plans hold every pair once, fit the profile and leave no tiny last batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.engines.manifest import Profile
from edje.errors import RequestError
from edje.runtime.batcher import plan_batches

LENGTHS = st.lists(st.integers(3, 63), min_size=1, max_size=12)


@st.composite
def requests(draw):
    lengths = draw(LENGTHS)
    pairs = draw(st.lists(st.integers(0, len(lengths) - 1), max_size=80))
    buckets = sorted({*draw(st.sets(st.integers(3, 64), max_size=4)), 63})
    profile = Profile(draw(st.integers(1, 30)), tuple(buckets))
    return np.array(lengths, np.int32), np.array(pairs, np.int64), profile


@given(requests())
def test_every_pair_is_planned_once_in_a_batch_that_fits(request_):
    lengths, query_of_pair, profile = request_
    seen = []
    for batch in plan_batches(lengths, query_of_pair, profile):
        assert 1 <= len(batch.pairs) <= profile.max_pairs
        assert batch.query_of_pair.dtype == np.int32
        assert batch.queries[batch.query_of_pair].tolist() == query_of_pair[batch.pairs].tolist()
        longest = lengths[batch.queries].max()
        assert batch.bucket == min(b for b in profile.text_buckets if b >= longest)
        assert len(set(batch.queries.tolist())) == len(batch.queries)
        seen += batch.pairs.tolist()
    assert sorted(seen) == list(range(len(query_of_pair)))


@given(requests())
def test_batches_of_one_bucket_have_almost_equal_sizes(request_):
    lengths, query_of_pair, profile = request_
    sizes: dict[int, list[int]] = {}
    for batch in plan_batches(lengths, query_of_pair, profile):
        sizes.setdefault(batch.bucket, []).append(len(batch.pairs))
    for of_bucket in sizes.values():
        assert max(of_bucket) - min(of_bucket) <= 1
        assert len(of_bucket) == -(-sum(of_bucket) // profile.max_pairs)


def test_512_candidates_of_one_query_are_two_full_batches():
    plan = plan_batches(
        np.array([15], np.int32), np.zeros(512, np.int64), Profile(256, (16, 24, 64))
    )
    assert [(batch.bucket, len(batch.pairs)) for batch in plan] == [(16, 256), (16, 256)]
    assert plan[0].pairs.tolist() == list(range(256))


def test_a_query_longer_than_every_bucket_is_refused_by_name():
    with pytest.raises(RequestError, match="query 1 has 20"):
        plan_batches(np.array([5, 22], np.int32), np.array([0, 1]), Profile(4, (8, 16)))
