"""What Prometheus reads at `/metrics`. Times are in seconds, as its conventions want."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..pipeline import Scored
from .answers import Stages
from .contract import Service
from .service import ScoringService

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# From 100 us, where tokenising lies, to 30 s, the default deadline; each about 1.8 times the last.
_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_PAIRS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
Own = TypeVar("Own")
REQUEST_STAGES = ("tokenize", "resolve", "queue", "encode")
BATCH_STAGES = ("read", "upload", "compute", "download")


class Metrics:
    """Counters of one server; it outlives the services that follow each other in it."""

    def __init__(self, current: Callable[[], Service | None], ready: Callable[[], bool]):
        """`current`: the service that takes requests now; `ready`: what `/readyz` says."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "edje_requests", "Requests answered.", ["dialect", "status"], registry=registry
        )
        self.refusals = Counter(
            "edje_refusals", "Requests that got no ranking.", ["reason"], registry=registry
        )
        self.pairs = Counter("edje_pairs", "Query-image pairs scored.", registry=registry)
        self._hits = Counter(
            "edje_residency_hits", "Pairs whose tokens lay on the device.", registry=registry
        )
        self._misses = Counter(
            "edje_residency_misses",
            "Pairs whose tokens were read for a device that keeps some.",
            registry=registry,
        )
        self.bad_records = Counter(
            "edje_bad_records", "Candidates whose record gave no score.", registry=registry
        )
        self.unknown_ids = Counter(
            "edje_unknown_ids", "Candidates that the store lacks.", registry=registry
        )
        self.disconnects = Counter(
            "edje_disconnects", "Requests whose client left.", registry=registry
        )
        self.reloads = Counter("edje_reloads", "Reloads.", ["outcome"], registry=registry)
        for outcome in ("done", "failed"):  # from 0 on: Prometheus sees no rise in a first sample
            self.reloads.labels(outcome)
        self.log_lines_lost = Counter(
            "edje_log_lines_lost", "Log lines that could not be written.", registry=registry
        )
        self.body_bytes = Gauge(
            "edje_body_bytes", "Bodies of requests that are not answered.", registry=registry
        )
        self.batch_pairs = Histogram(
            "edje_batch_pairs", "Pairs in a batch.", buckets=_PAIRS, registry=registry
        )
        self.request_seconds = Histogram(
            "edje_request_seconds",
            "From body to answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        stages = Histogram(
            "edje_stage_seconds",
            "Time in a stage: of a request (tokenize, resolve, queue, encode) or of a batch.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._stages = {name: stages.labels(name) for name in (*REQUEST_STAGES, *BATCH_STAGES)}
        Gauge("edje_ready", "1 while /readyz says so.", registry=registry).set_function(
            lambda: float(ready())
        )
        registry.register(_ServiceCollector(current, self))
        ProcessCollector(registry=registry)  # memory, CPU, open files
        self._own: dict[Callable[[CollectorRegistry], Any], Any] = {}
        self.dropped_before = 0  # pairs that services dropped which have ended

    def own(self, make: Callable[[CollectorRegistry], Own]) -> Own:
        """Return the counters that `make` makes: once, for services that follow each other."""
        if make not in self._own:
            self._own[make] = make(self.registry)
        found: Own = self._own[make]
        return found

    def count_batch(self, scored: Scored, num_pairs: int) -> None:
        """Count one batch; runs on the thread that scored it."""
        self.pairs.inc(num_pairs)
        self.batch_pairs.observe(num_pairs)
        self._hits.inc(scored.num_hits)
        self._misses.inc(scored.num_misses)
        observed = {
            "read": scored.gather_ms,
            "upload": scored.upload_ms,
            "compute": scored.compute_ms,
            "download": scored.download_ms,
        }
        for name, milliseconds in observed.items():
            self._stages[name].observe(milliseconds / 1e3)

    def count_stages(self, stages: Stages, encode_s: float) -> None:
        """Count where one answered request spent its time."""
        self._stages["tokenize"].observe(stages.tokenize / 1e3)
        self._stages["resolve"].observe(stages.resolve / 1e3)
        self._stages["queue"].observe(stages.queue / 1e3)
        self._stages["encode"].observe(encode_s)

    def text(self) -> bytes:
        """Return everything as Prometheus reads it."""
        return generate_latest(self.registry)


class _ServiceCollector(Collector):
    """Figures that the service holds, asked for when somebody looks."""

    def __init__(self, current: Callable[[], Service | None], metrics: Metrics):
        self._current, self._metrics = current, metrics

    def collect(self) -> Iterator[Metric]:
        """Yield the figures of now."""
        service = self._current()
        if service is None:
            return
        load = service.load()
        yield _gauge("edje_queue_pairs", "Pairs that wait for a batch.", load.num_pairs)
        yield _gauge("edje_queue_seconds", "Time that what waits will take.", load.wait_s)
        limit = service.options.max_wait_s
        yield _gauge("edje_queue_limit_seconds", "Requests are refused above it.", limit)
        yield _gauge("edje_requests_in_flight", "Requests being served.", load.num_requests)
        yield _gauge("edje_pairs_per_second", "Scored lately, at full batches.", load.pairs_per_s)
        dropped = CounterMetricFamily(
            "edje_dropped_pairs", "Pairs never scored: their caller left, or was too late."
        )
        dropped.add_metric([], self._metrics.dropped_before + service.num_dropped)
        yield dropped
        if isinstance(service, ScoringService):
            yield from _engine_figures(service)


def _engine_figures(service: ScoringService) -> Iterator[Metric]:
    """Yield what only an engine in this process has."""
    usage = service.reranker.usage()
    yield _gauge("edje_pinned_bytes", "Pinned host memory.", usage.pinned_bytes)
    yield _gauge("edje_device_bytes", "Device memory.", usage.device_bytes)
    labels = ("backend", "precision", "device", "tokens", "residency", "layers")
    info = GaugeMetricFamily("edje_engine_info", "The engines in use.", labels=labels)
    for label in service.reranker.labels:
        info.add_metric([str(getattr(label, name)) for name in labels], 1)
    yield info


def _gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, what, value=value)
