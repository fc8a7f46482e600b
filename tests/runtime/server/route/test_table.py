"""Ids -> shards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edje.runtime.server.route.table import Table

LARGEST = 2**64 - 1
digests = st.one_of(
    st.integers(0, LARGEST), st.sampled_from([0, 1, LARGEST - 1, LARGEST, 2**63, 2**63 - 1])
)


@given(st.lists(st.sets(digests, max_size=30), min_size=1, max_size=4), st.lists(digests))
def test_every_id_is_found_in_the_first_shard_that_holds_it(
    parts: list[set[int]], others: list[int]
):
    table = Table([np.array(sorted(part), np.uint64) for part in parts])
    asked = [*set().union(*parts), *others]
    expected = [next((n for n, part in enumerate(parts) if d in part), -1) for d in asked]
    assert table.find(np.array(asked, np.uint64)).tolist() == expected
    assert table.num_ids == len(set().union(*parts))
    assert table.num_doubles == sum(map(len, parts)) - table.num_ids


def test_a_shard_that_told_nothing_holds_nothing():
    table = Table([None, np.array([5], np.uint64)])
    assert table.find(np.array([5, 6], np.uint64)).tolist() == [1, -1]


@pytest.mark.parametrize("number", [1, 2, 3, 1000, 4096])
def test_digests_as_hashes_spread_are_found(number: int):
    random = np.random.default_rng(number)
    each = np.unique(random.integers(0, LARGEST, number, np.uint64, endpoint=True))
    table = Table([each[0::2], each[1::2]])
    found = table.find(each)
    assert found.tolist() == [at % 2 for at in range(len(each))]
    assert (table.find(each + np.uint64(1)) == -1).sum() >= len(each) - 2
