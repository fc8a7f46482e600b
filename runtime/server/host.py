"""The service that takes requests now, and the one that takes its place on a reload."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

from ...errors import EngineError
from .contract import Service
from .health import INTERVAL_S, PROBE_TIMEOUT_S, Health
from .logs import JsonLog
from .metrics import Metrics
from .settings import FrontSettings

DRAIN_S = 30.0


class Host:
    """Opens a service, watches it, replaces it, ends it.

    Attributes:
        service: takes requests now.
        generation: 1 for the first service, one more at each reload.
        draining: why no new request is wanted; None: they are.
    """

    def __init__(
        self,
        settings: FrontSettings,
        log: JsonLog,
        *,
        on_death: Callable[[str], None] = lambda _: None,
        probe_every_s: float = INTERVAL_S,
        probe_timeout_s: float = PROBE_TIMEOUT_S,
    ):
        """Open the service and probe it.

        Args:
            on_death: called with the reason when the engine has failed for good.

        Raises:
            RequestError: settings that cannot be meant.
            EdjeError: the service cannot be opened, or the first probe failed for good.
        """
        settings.check()
        self.settings, self.log = settings, log
        self._on_death = on_death
        self._reloading = threading.Lock()
        self.service: Service | None = None
        self.generation = 0
        self.draining: str | None = None
        self.metrics = Metrics(lambda: self.service, lambda: self.ready)
        log_lost = self.metrics.log_lines_lost
        log.on_lost = lambda number: log_lost.inc(number)
        self.health = Health(
            lambda: self.service, self._died, interval_s=probe_every_s, timeout_s=probe_timeout_s
        )
        self.service = self._open()
        self.health.start()
        if self.health.fault is not None and not self.health.passes:
            fault = self.health.fault
            self.close(0.0)
            raise EngineError(f"the first probe failed: {fault}")

    @property
    def ready(self) -> bool:
        """Whether a request would be served, and right."""
        return self.draining is None and self.health.ready

    def state(self) -> dict[str, Any]:
        """Return what `/readyz` says; nothing of paths."""
        why = self.draining or self.health.fault
        return {"ready": self.ready, "generation": self.generation, **({"why": why} if why else {})}

    def reload(self) -> None:
        """Open engine and store anew and let the new service take over; no request is lost.

        The old one finishes what it has accepted. Both are in memory meanwhile.

        Raises:
            EdjeError: the new one cannot be opened or fails its probe; the old one stays.
            Exception: the system refused it memory or threads; the old one stays, too.
        """
        with self._reloading:
            try:
                fresh = self._open()
            except Exception as error:
                self.metrics.reloads.labels("failed").inc()
                why = str(error) or type(error).__name__  # a MemoryError says nothing
                self.log.write("reload", outcome="failed", error=why)
                raise
            old, self.service = self.service, fresh
            self.generation += 1
            self.health.check()
            self.metrics.reloads.labels("done").inc()
            self.log.write("reload", outcome="done", generation=self.generation)
            if old is not None:
                old.close(DRAIN_S)
                self.metrics.dropped_before += old.num_dropped
                del old
                gc.collect()  # engine and store are in circles: tens of MB would wait for it

    def drain(self, why: str) -> None:
        """Say not ready; requests that still come are served."""
        self.draining = why
        self.log.write("draining", why=why)

    def close(self, drain_s: float = DRAIN_S) -> None:
        """Finish what was accepted, within `drain_s` seconds, and free everything."""
        self.health.stop()
        with self._reloading:
            if self.service is not None:
                self.service.close(drain_s)

    def _open(self) -> Service:
        service = self.settings.open_service(self.metrics, self._failed)
        if not self.generation:
            self.generation = 1
        return service

    def _failed(self, error: Exception) -> None:
        self.log.write("batch_failed", error=str(error), stage=getattr(error, "stage", None))
        self.health.look_now()

    def _died(self, why: str) -> None:
        self.log.write("engine_dead", why=why)
        self.drain("the engine is dead")
        self._on_death(why)
