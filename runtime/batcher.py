"""Pairs of one or many queries -> batches that fit the engine's profile. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterator
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
    buckets = np.array(sorted(profile.text_buckets), np.int64)
    _check_lengths(text_length, int(buckets[-1]))
    bucket_of_query = buckets[np.searchsorted(buckets, text_length)]
    bucket_of_pair = bucket_of_query[query_of_pair]
    plan = _planned if len(text_length) > 1 else _planned_alone
    return [
        plan(int(bucket), pairs, query_of_pair)
        for bucket in np.unique(bucket_of_pair)
        for pairs in _split(np.flatnonzero(bucket_of_pair == bucket), profile.max_pairs)
    ]


def _check_lengths(text_length: Int32, longest: int) -> None:
    too_long = np.flatnonzero(text_length > longest)
    if too_long.size:
        raise RequestError(
            f"the engine takes queries of up to {longest - 2} wordpieces",
            faults=[f"query {q} has {int(text_length[q]) - 2}" for q in too_long[:20]],
            hint="build the engine with a larger --text-buckets value",
        )


def _split(pairs: Int64, max_pairs: int) -> Iterator[Int64]:
    """Cut `pairs` into the fewest parts of at most `max_pairs`, their sizes equal within one."""
    return (pairs[part] for part in even_parts(len(pairs), max_pairs))


def _planned(bucket: int, pairs: Int64, query_of_pair: Int64) -> PlannedBatch:
    queries, local = np.unique(query_of_pair[pairs], return_inverse=True)
    return PlannedBatch(bucket, queries, local.astype(np.int32), pairs)


def _planned_alone(bucket: int, pairs: Int64, query_of_pair: Int64) -> PlannedBatch:
    """As `_planned` for a request of one query, the usual case: nothing to sort."""
    return PlannedBatch(bucket, _FIRST, np.zeros(len(pairs), np.int32), pairs)
