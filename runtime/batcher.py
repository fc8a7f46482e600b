"""Pairs of one or many queries -> batches that fit the engine's profile. Pure: no clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import Int32, Int64, even_parts
from ..engines.manifest import Profile
from ..errors import RequestError

_FIRST: Int64 = np.zeros(1, np.int64)


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """Which pairs of a request run together.

    Attributes:
        bucket: text slots T of the batch.
        queries: int64 [Q]: the request's queries in this batch, ascending.
        query_of_pair: int32 [P]: index into `queries` for each pair.
        pairs: int64 [P]: the request's pairs in this batch.
    """

    bucket: int
    queries: Int64
    query_of_pair: Int32
    pairs: Int64


def plan_batches(text_length: Int32, query_of_pair: Int64, profile: Profile) -> list[PlannedBatch]:
    """Split a request into batches of at most `profile.max_pairs` pairs of one text bucket.

    Pairs of one bucket are spread evenly: 300 pairs with room for 256 become 150 + 150, as a
    small last batch would leave the machine half idle. Every pair is in exactly one batch.

    Args:
        text_length: int32 [Q]: ids of each query, CLS and SEP included.
        query_of_pair: int64 [N]: the query each pair of the request asks.
        profile: the engine's limits.

    Raises:
        RequestError: a query is longer than the largest bucket.
    """
    if len(text_length) == 1:  # one query, the usual case: nothing to sort
        return _plan_one(int(text_length[0]), len(query_of_pair), profile)
    buckets = np.array(sorted(profile.text_buckets), np.int64)
    longest = int(buckets[-1])
    if (text_length > longest).any():
        raise _too_long(text_length, longest)
    bucket_of_query = buckets[np.searchsorted(buckets, text_length)]
    bucket_of_pair = bucket_of_query[query_of_pair]
    batches = []
    for bucket in sorted(set(bucket_of_query.tolist())):
        pairs_of_bucket = np.flatnonzero(bucket_of_pair == bucket)
        for part in even_parts(len(pairs_of_bucket), profile.max_pairs):
            pairs = pairs_of_bucket[part]
            queries, local = _asked(query_of_pair[pairs], len(text_length))
            batches.append(PlannedBatch(bucket, queries, local.astype(np.int32), pairs))
    return batches


def _asked(query_of_pair: Int64, num_queries: int) -> tuple[Int64, Int64]:
    """Return which queries are asked, ascending, and where among them each pair's one is."""
    is_asked = np.bincount(query_of_pair, minlength=num_queries) > 0
    if is_asked.all():  # in most batches
        return np.arange(num_queries), query_of_pair
    return np.flatnonzero(is_asked), (is_asked.cumsum() - 1)[query_of_pair]


def _plan_one(length: int, num_pairs: int, profile: Profile) -> list[PlannedBatch]:
    """Split the pairs of one query."""
    fitting = [bucket for bucket in profile.text_buckets if length <= bucket]
    if not fitting:
        raise _too_long(np.array([length]), max(profile.text_buckets))
    bucket, pairs, first = min(fitting), np.arange(num_pairs), np.zeros(num_pairs, np.int32)
    return [
        PlannedBatch(bucket, _FIRST, first[part], pairs[part])
        for part in even_parts(num_pairs, profile.max_pairs)
    ]


def _too_long(text_length: Int32, longest: int) -> RequestError:
    which = np.flatnonzero(text_length > longest)
    return RequestError(
        f"the engine takes queries of up to {longest - 2} wordpieces",
        faults=[f"query {q} has {int(text_length[q]) - 2}" for q in which[:20]],
        hint="build the engine with a larger --text-buckets value",
    )
