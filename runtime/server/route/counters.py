"""What a router counts of its shards."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)


class Counters:
    """Counters of one router, by the shards' names; they outlive a reload."""

    def __init__(self, registry: CollectorRegistry):
        self.requests = Counter(
            "edje_shard_requests", "Asked of shards.", ["shard", "status"], registry=registry
        )
        self.retries = Counter(
            "edje_shard_retries", "Asked once more.", ["shard"], registry=registry
        )
        self.pairs = Counter("edje_shard_pairs", "Pairs sent.", ["shard"], registry=registry)
        self.seconds = Histogram(
            "edje_shard_seconds",
            "From question to answer of a shard, retries included.",
            ["shard"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.ready = Gauge(
            "edje_shard_ready_replicas", "Servers that are ready.", ["shard"], registry=registry
        )
        self.ids = Gauge("edje_routed_ids", "Ids that the router knows.", registry=registry)
        self.partial = Counter(
            "edje_partial_answers", "Answers without some shard.", registry=registry
        )
