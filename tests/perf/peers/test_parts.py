"""Stores and servers of others beside ours: the same records, the same ranking."""

import numpy as np
import pytest

from edje.errors import EdjeError
from edje.perf.peers import serving, stores
from edje.perf.peers.ours import auto_engine


def test_every_store_gives_the_records(opened_bench):
    bench, [question] = opened_bench(300)
    measured, skipped = stores.measure_stores(bench, question.pairs.tokens, 3)
    names = {one.name for one in measured}
    assert names | skipped.keys() == {
        "token-store",
        "token-store-unverified",
        "numpy-map",
        "lmdb",
        "safetensors",
    }
    assert all(one.pairs == 256 and len(one.seconds) == 3 for one in measured)


def test_a_store_with_other_records_is_found(opened_bench):
    bench, [question] = opened_bench(300)
    with pytest.raises(EdjeError, match="token-store: the records differ"):
        stores.measure_stores(bench, np.roll(question.pairs.tokens, 1, axis=0), 1)


@pytest.mark.slow
def test_both_servers_rank_alike(opened_bench):
    bench, [question] = opened_bench(60)
    loads = [serving.Load("front", True, 2, 2, 50), serving.Load("small", False, 2, 1, 4)]
    measured = serving.measure_serving(bench, auto_engine(bench), question.text, 2, loads)
    found = {(one.params["load"], one.name): one for one in measured}
    assert set(found) == {(load.name, name) for load in loads for name in serving.NAMES}
    assert found["front", "edje-serve"].pairs == 2 * 2 * 50
    assert all(one.conditions["requests_per_s"] > 0 for one in measured)
