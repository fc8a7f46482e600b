"""Who may ask, and how much at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edje.runtime.server.keys import Keys
from edje.runtime.server.refusals import Refusal


@pytest.mark.parametrize("header", [b"Bearer one", b"bearer one", b"one", b" Bearer  one "])
def test_a_key_counts_with_and_without_bearer(header):
    assert Keys(["zero", "one"], None).check(header) == Keys(["one"], None).check(b"one")


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer ", b"two", b"Basic one", b"on"])
def test_anything_else_is_refused(header):
    with pytest.raises(Refusal) as refused:
        Keys(["one"], None).check(header)
    assert refused.value.status == 401


def test_without_keys_everybody_may_ask():
    assert Keys([], 5).check(None) is None
    Keys([], 5).take(None, 1000)


def test_a_keys_name_tells_nothing_of_the_key():
    name = Keys(["secret-key"], None).check(b"secret-key")
    assert name is not None
    assert "secret" not in name


def test_a_key_has_so_many_pairs_in_flight_and_one_request_of_any_size():
    keys = Keys(["one", "two"], 100)
    one, two = keys.check(b"one"), keys.check(b"two")
    keys.take(one, 500)  # alone, whatever its size
    with pytest.raises(Refusal) as refused:
        keys.take(one, 1)
    assert refused.value.status == 429
    assert refused.value.headers["retry-after"]
    keys.take(two, 60)
    keys.take(two, 40)
    keys.give_back(one, 500)
    keys.take(one, 1)


class SlowNumber(int):
    """A number of pairs that takes its time to be added: another thread comes between for sure."""

    def __radd__(self, other: int) -> int:
        time.sleep(0.1)
        return int(self) + other


def test_the_limit_holds_between_threads():
    """Large bodies are read on a thread of their own, while the event loop reads small ones."""
    keys = Keys(["one"], 100)
    one = keys.check(b"one")

    def take(_: int) -> int:
        try:
            keys.take(one, SlowNumber(60))
        except Refusal as refused:
            return refused.status
        return 200

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(take, range(3))) == [200, 429, 429]
    keys.give_back(one, 60)
    keys.take(one, 100)
