"""Room for hidden states: the best so far stay, what is on its way stays, no place has two."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.arrays import DeviceArray
from edje.runtime.hidden import NOWHERE, Hidden, HiddenPool, open_hidden_pool
from recording_device import RecordingDevice
from toy_engine import ToyEngine, toy_manifest

SLOTS, WIDTH = 20, 128


def room_for(num_places: int, num_pairs: int) -> Hidden:
    states = DeviceArray(0, (num_places, SLOTS, WIDTH), np.dtype(np.float16))
    scores = np.full(num_pairs, np.nan, np.float32)
    return Hidden(states, np.full(num_pairs, NOWHERE, np.int32), scores=scores)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.lists(st.floats(-9, 9, width=32), min_size=1))
def test_every_place_has_one_pair_and_what_is_on_its_way_stays(num_places, size, values):
    scores = np.array(values, np.float32)
    hidden = room_for(num_places, len(scores))
    for start in range(0, len(scores), size):
        pairs = np.arange(start, min(start + size, len(scores)))
        under_way = np.arange(max(0, start - 2 * size), start)  # two batches before this one
        before = hidden.place[under_way].tolist()
        found = hidden.places(pairs)
        assert hidden.place[under_way].tolist() == before
        assert found.tolist() == hidden.place[pairs].tolist()
        done = slice(0, max(0, start - size))
        hidden.scores[done] = scores[done]
        held = hidden.place[hidden.place != NOWHERE]
        assert len(set(held.tolist())) == len(held)
        assert ((held >= 0) & (held < num_places)).all()


def test_the_best_of_many_are_kept():
    scores = np.random.default_rng(0).permutation(1000).astype(np.float32)
    hidden = room_for(100, len(scores))
    for start in range(0, 1000, 10):
        pairs = np.arange(start, start + 10)
        hidden.places(pairs)
        if start >= 20:
            hidden.scores[pairs - 20] = scores[pairs - 20]
    hidden.scores[:] = scores
    best = np.argsort(-scores)[:50]
    assert (hidden.place[best] != NOWHERE).all()
    again = hidden.of(best)
    assert again.resumes
    assert again.places(np.arange(50)).tolist() == hidden.place[best].tolist()


def test_a_pair_without_a_score_starts_again():
    hidden = room_for(8, 4)
    hidden.places(np.arange(4))
    hidden.scores[:] = [1, np.nan, np.inf, 2]
    hidden.forget_unscored()
    assert (hidden.place == NOWHERE).tolist() == [False, True, True, False]


class Keeping(ToyEngine):
    """Keeps hidden states, as far as anybody can tell."""

    def hidden_shape(self, bucket):
        return bucket + 5, WIDTH


def test_room_is_lent_to_one_request_and_comes_back():
    part = DeviceArray(0, (100 * 20 * WIDTH,), np.dtype(np.float16))
    pool = HiddenPool(Keeping(toy_manifest()), [part], frozenset({1}))
    longest = max(toy_manifest().profile.text_buckets)
    with pool.lend(3, 7) as hidden:
        assert hidden is not None
        assert hidden.place.tolist() == [NOWHERE] * 7
        assert hidden.states.shape[1:] == Keeping(toy_manifest()).hidden_shape(
            min(toy_manifest().profile.text_buckets)
        )
        with pool.lend(3, 7) as second:
            assert second is None
    with pool.lend(longest + 1, 7) as none:  # refused later, by name
        assert none is None
    with pool.lend(longest, 7) as again:
        assert again is not None


def test_engines_that_start_again_take_no_memory():
    device = RecordingDevice(None)
    engines = [ToyEngine(toy_manifest()), ToyEngine(toy_manifest())]
    before = device.usage()
    assert open_hidden_pool(engines, device) is None
    assert open_hidden_pool([Keeping(toy_manifest()), engines[0]], device) is None
    assert device.usage() == before
