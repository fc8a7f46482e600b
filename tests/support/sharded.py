"""Parts of one store, each with its server, and the router before them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edje.runtime.server import OverloadedError, ScoringService
from edje.runtime.server.answers import Answer
from edje.runtime.server.route.settings import RouteSettings
from edje.runtime.store import TokenStore
from running_server import Running, running

CLOSED = "http://127.0.0.1:9"  # nothing listens there


def cut(store: Path, ids: Sequence[str], out: Path) -> Path:
    """Copy the records of `ids` into a store of their own."""
    with TokenStore.open(store) as source:
        layout = source.layout
        tokens = np.empty((len(ids), layout.num_tokens, layout.hidden), layout.dtype)
        source.read(source.rows(ids), tokens)
    with TokenStore.create(
        out,
        num_tokens=layout.num_tokens,
        hidden=layout.hidden,
        fingerprint_encoder=layout.fingerprint_encoder,
        dtype=layout.dtype,
    ) as made:
        made.append(ids, tokens)
    return out


@contextmanager
def routing(*shards: Sequence[str], every_s: float = 0.2, **options: Any) -> Iterator[Running]:
    """Route to shards, each given by the URLs of its servers, until the block ends."""
    with running(RouteSettings(shards, **options), probe_every_s=every_s) as started:
        yield started


class Busy(ScoringService):
    """A service that has too much to do."""

    def submit(self, query: str, candidates: Any, **options: Any) -> Future[Answer]:
        raise OverloadedError("much waits", 7.0)


class Silent(ScoringService):
    """A service that accepts requests and never answers; `asked` holds what it accepted.

    Its probe is right all the same.
    """

    def submit(self, query: str, candidates: Any, **options: Any) -> Future[Answer]:
        asked: Future[Answer] = Future()
        self.asked.append((options, asked))
        return asked

    @property
    def asked(self) -> list[tuple[dict[str, Any], Future[Answer]]]:
        return self.__dict__.setdefault("_asked", [])
