"""What Prometheus reads at `/metrics`. Times are in seconds, as its conventions want."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..pipeline import Scored
from .answers import Stages
from .contract import Service
from .service import ScoringService
from .tallies import Tally

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
        self.tallies = Tallies()
        registry.register(self.tallies)
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
        self.tallies.batches.note(
            scored.gather_ms / 1e3,
            scored.upload_ms / 1e3,
            scored.compute_ms / 1e3,
            scored.download_ms / 1e3,
            num_pairs,
            scored.num_hits,
            scored.num_misses,
        )

    def count_stages(self, stages: Stages, encode_s: float) -> None:
        """Count where one answered request spent its time."""
        milliseconds = stages.tokenize, stages.resolve, stages.queue
        self.tallies.stages.note(*(each / 1e3 for each in milliseconds), encode_s)

    def count_seconds(self, seconds: float) -> None:
        """Count how long one request took from body to answer."""
        self.tallies.requests.note(seconds)

    def text(self) -> bytes:
        """Return everything as Prometheus reads it."""
        return generate_latest(self.registry)


class Tallies(Collector):
    """What every request and every batch adds to.

    Attributes:
        requests: seconds of each.
        stages: seconds of each request's `REQUEST_STAGES`.
        batches: seconds of each batch's `BATCH_STAGES`, its pairs, hits and misses.
    """

    def __init__(self) -> None:
        self.requests = Tally([_SECONDS])
        self.stages = Tally([_SECONDS] * len(REQUEST_STAGES))
        self.batches = Tally([*[_SECONDS] * len(BATCH_STAGES), _PAIRS, (), ()])

    def collect(self) -> Iterator[Metric]:
        """Yield the figures of now."""
        batches, pairs = self.batches, len(BATCH_STAGES)
        yield batches.counter(pairs, "edje_pairs", "Query-image pairs scored.")
        yield batches.histogram("edje_batch_pairs", "Pairs in a batch.", [pairs])
        hits = "Pairs whose tokens lay on the device."
        yield batches.counter(pairs + 1, "edje_residency_hits", hits)
        misses = "Pairs whose tokens were read for a device that keeps some."
        yield batches.counter(pairs + 2, "edje_residency_misses", misses)
        yield self.requests.histogram("edje_request_seconds", "From body to answer.", [0])
        what = "Time in a stage: of a request (tokenize, resolve, queue, encode) or of a batch."
        name, label = "edje_stage_seconds", "stage"
        of_requests = range(len(REQUEST_STAGES))
        family = self.stages.histogram(name, what, of_requests, label, REQUEST_STAGES)
        of_batches = batches.histogram(name, what, range(pairs), label, BATCH_STAGES)
        family.samples += of_batches.samples
        yield family


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
