"""What `run.py` prepared for the clients' tests: an engine, a store, and rankings to compare."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import exp
from pathlib import Path

from edje.perf.server_process import ServerProcess, serving

SETUP = "EDJE_CLIENTS_SETUP"  # a file that `run.py` writes
KEY = "a-key"
PATTERN = r"scene-\d+\.png"
UNKNOWN = "no-such.png"


@dataclass(frozen=True)
class Case:
    """A query, its candidates, and the ranking that `Reranker.rank` gives: positions and logits."""

    query: str
    ids: list[str]
    order: list[int]
    logits: list[float]

    @property
    def ranked(self) -> list[str]:
        """The ids, best first."""
        return [self.ids[i] for i in self.order]

    @property
    def scores(self) -> list[float]:
        """The ranking's scores as most dialects have them."""
        return [1 / (1 + exp(-logit)) for logit in self.logits]


@dataclass(frozen=True)
class Setup:
    """What `run.py` prepared."""

    python: str
    engine: Path
    store: Path
    cases: list[Case]

    def serve(
        self, *options: str, keys: Sequence[str] = ()
    ) -> AbstractContextManager[ServerProcess]:
        """Start a server."""
        env = {**os.environ, "EDJE_API_KEYS": ",".join(keys), "PYTHONPATH": ""}
        command = (self.python, "-m", "edje")
        return serving(self.engine, self.store, *options, command=command, environ=env)
