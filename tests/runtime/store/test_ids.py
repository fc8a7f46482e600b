"""Ids -> row handles: the same in C and in Python, for any ids, segments, appends and removals."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edje.runtime.store import ids as looking_up
from edje.runtime.store.ids import RecordIndex
from edje.runtime.store.records import RecordBatch, Records, digests_of
from edje.runtime.store.unlocked import find_ids, is_built, table_of

SIZES = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128, 129, 159, 160]
# An id may be 1,024 bytes; what is asked for may be longer, empty, or no Unicode.
IDS = st.one_of(
    st.text(max_size=6),
    st.text(st.characters(codec="utf-8"), max_size=300),
    st.builds(
        str.__mul__, st.sampled_from("aß片🙂"), st.sampled_from([*SIZES, 161, 240, 241, 1100])
    ),
    st.text(st.characters(), max_size=4),  # lone surrogates as well
)
needs_c = pytest.mark.skipif(not is_built(), reason="the C extension was not built")


def batch(segment: int, first_row: int, ids: list[str]) -> RecordBatch:
    """Records of `ids`, one behind the other."""
    return RecordBatch(
        segment, first_row, Records.pack(ids, digests_of(ids), np.zeros(len(ids), np.uint64))
    )


def index_of(segments: list[list[str]], *, in_c: bool) -> RecordIndex:
    """An index of these segments' ids, which looks up in C or in Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looking_up, "is_built", lambda: in_c)
        counts = {number: len(ids) for number, ids in enumerate(segments)}
        batches = [batch(number, 0, ids) for number, ids in enumerate(segments) if ids]
        return RecordIndex(counts, batches, np.empty(0, np.int64))


def storable(text: str) -> bool:
    """Whether a store takes it: Unicode of 1 to 1,024 bytes without NUL."""
    size = len(text.encode("utf-8", "surrogatepass"))
    return (
        0 < size <= 1024 and "\0" not in text and not any(0xD800 <= ord(c) < 0xE000 for c in text)
    )


@needs_c
@settings(max_examples=150, deadline=None)
@given(data=st.data(), ids=st.lists(IDS, unique=True, max_size=40))
def test_any_ids_get_the_same_rows_in_c_and_in_python(data, ids):
    stored = [each for each in ids if storable(each)]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stored)), min_size=1, max_size=3)))
    *segments, fresh = [stored[a:b] for a, b in pairwise([0, *cuts, len(stored)])]
    ways = [index_of(segments, in_c=in_c) for in_c in (True, False)]
    asked = data.draw(st.lists(st.sampled_from(ids) | IDS if ids else IDS, max_size=90))
    gone = data.draw(st.lists(st.sampled_from(stored), unique=True)) if stored else []
    gone = [each for each in gone if each not in fresh]
    for index in ways:
        if fresh:
            index.add([batch(len(segments), 0, fresh)], fresh, np.empty(0, np.int64))
        index.remove(gone, index.rows(gone)[0])
    (rows, unknown), (expected, expected_unknown) = (index.rows(asked) for index in ways)
    assert rows.tolist() == expected.tolist()
    assert unknown == expected_unknown
    there = set(stored) - set(gone)
    assert [row >= 0 for row in rows.tolist()] == [name in there for name in asked]
    assert rows.flags.writeable


@needs_c
@settings(max_examples=300, deadline=None)
@given(content=st.one_of(st.text(st.characters(codec="utf-8"), min_size=1, max_size=400)))
@example("x" * 5000)
def test_an_id_is_hashed_as_by_xxhash(content):
    """One record, which is found only if both halves of the digest are right."""
    digest = xxhash.xxh3_128_intdigest(content.encode())
    low, high = digest & (2**64 - 1), digest >> 64
    keys, order = np.array([low, 2**64 - 1], np.uint64), np.zeros(1, np.uint32)
    highs, live = np.array([high], np.uint64), np.ones(1, np.bool_)
    buckets = np.array([0, 1 - (low >> 63), 1], np.uint32)
    assert find_ids([content], table_of(buckets, keys, order, highs, live, 63))[1] == 1
    highs[0] ^= np.uint64(1)
    assert find_ids([content], table_of(buckets, keys, order, highs, live, 63))[1] == 0


@needs_c
def test_ids_that_share_the_low_half_of_their_digests_are_told_apart_by_the_high_half():
    digests = [xxhash.xxh3_128_intdigest(name.encode()) for name in "ab"]
    low = digests[0] & (2**64 - 1)
    keys = np.array([low, low, low, 2**64 - 1], np.uint64)
    highs = np.array([7, digests[0] >> 64, digests[0] >> 64], np.uint64)
    live, order = np.array([True, True, False]), np.array([2, 0, 1], np.int64)
    buckets = np.array([0, 3, 3] if low >> 63 == 0 else [0, 0, 3], np.int64)
    table = table_of(buckets, keys, order, highs, live, 63)
    places, num_found = find_ids(["a", "b"], table)
    assert (np.frombuffer(places, np.int64).tolist(), num_found) == ([1, -1], 1)


@needs_c
def test_an_empty_store_holds_nothing():
    index = index_of([], in_c=True)
    assert index.rows(["a", "", "\ud800"])[0].tolist() == [-1, -1, -1]
    assert index.rows([])[0].tolist() == []


@pytest.mark.parametrize("in_c", [pytest.param(True, marks=needs_c), False])
@pytest.mark.parametrize("wrong", [None, 7, b"a"])
def test_what_is_no_string_is_refused(in_c, wrong):
    index = index_of([["a"]], in_c=in_c)
    with pytest.raises(TypeError):
        index.rows(["a", wrong])
    assert index.rows(["a"])[0].tolist() == [0]


@needs_c
def test_a_table_of_another_size_is_refused():
    with pytest.raises(TypeError, match="table of 64 bytes"):
        find_ids(["a"], b"")
