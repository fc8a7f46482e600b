"""Health that tells the truth: ready means that a known pair was scored lately, and right."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

from ...errors import EdjeError
from .contract import Service
from .limits import PassingError

INTERVAL_S = 5.0
PROBE_TIMEOUT_S = 10.0
PROBES_TO_DEATH = 2  # one may fail of a passing fault; readiness is lost at the first


class Health:
    """Probes a service from a thread of its own.

    Attributes:
        fault: why the service is not ready; None: it is.
        passes: whether the fault may pass by itself.
        dead: the engine failed again and again; only a new process can help.
    """

    def __init__(
        self,
        current: Callable[[], Service | None],
        on_death: Callable[[str], None],
        *,
        interval_s: float = INTERVAL_S,
        timeout_s: float = PROBE_TIMEOUT_S,
    ):
        """Make it; `start` starts the thread.

        Args:
            current: the service to probe.
            on_death: called once, on the probing thread, with the reason.
            interval_s: between two probes.
            timeout_s: a probe's deadline: how long an accepted request may wait at most.
        """
        self._current, self._on_death = current, on_death
        self._interval_s, self._timeout_s = interval_s, timeout_s
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._watch, name="edje-health", daemon=True)
        self._failures = 0
        self._checked_at = monotonic()
        self.fault: str | None = "no probe has run yet"
        self.passes = False
        self.dead = False

    def start(self) -> None:
        """Begin to probe; the first probe has ended when this returns."""
        self.check()
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(self._timeout_s)

    @property
    def ready(self) -> bool:
        """Whether the last probe was right, and is recent: a thread that hangs is no good sign."""
        limit = 2 * (self._interval_s + self._timeout_s)
        return self.fault is None and monotonic() - self._checked_at < limit

    def look_now(self) -> None:
        """Probe at once: a batch has failed."""
        self._wake.set()

    def check(self) -> None:
        """Probe once."""
        service = self._current()
        if service is None:
            return
        try:
            service.probe(self._timeout_s)
        except EdjeError as error:
            if self._current() is not service:
                return  # a reload came between: the next probe asks the new one
            self.fault = error.message
            self.passes = isinstance(error, PassingError)
            self._failures = 0 if self.passes else self._failures + 1
        else:
            self.fault, self._failures = None, 0
        self._checked_at = monotonic()

    def _watch(self) -> None:
        while True:
            self._wake.wait(self._interval_s if self.fault is None else 0.5)
            self._wake.clear()
            if self._stopped:
                return
            self.check()
            if self._failures >= PROBES_TO_DEATH and not self.dead:
                self.dead = True
                self._on_death(self.fault or "")
