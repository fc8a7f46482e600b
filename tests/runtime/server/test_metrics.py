"""What `/metrics` counts of a device that keeps tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from edje.runtime.opening import RunOptions
from edje.runtime.reranker import Reranker
from edje.runtime.residency import ResidencyOptions
from edje.runtime.server import ScoringService
from recording_device import RecordingDevice, WatchedEngine
from running_server import GivenSettings, Running, running
from toy_engine import HIDDEN, NUM_TOKENS, toy_manifest, toy_store, toy_tokenizer

IDS = [f"img-{number}" for number in range(40)]
ROOM = 20 * NUM_TOKENS * HIDDEN * 2  # bytes of 20 images


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    """A server whose device has room for half of the images."""
    kept = ResidencyOptions("device", max_bytes=ROOM)
    with toy_store(tmp_path / "store", range(40)) as store:
        runs = RunOptions(device=RecordingDevice(7), residency=kept)
        engine = WatchedEngine(toy_manifest())
        reranker = Reranker(engine, toy_tokenizer(tmp_path), store, runs=runs)
        with running(GivenSettings(opens=lambda: ScoringService(reranker))) as started:
            yield started
        reranker.close()


def hits_and_misses(server: Running) -> tuple[float, float]:
    return (
        server.metric("edje_residency_hits_total"),
        server.metric("edje_residency_misses_total"),
    )


def test_hits_are_pairs_whose_tokens_lay_on_the_device(server: Running) -> None:
    found = [hits_and_misses(server)]
    for _ in range(2):
        reply = server.ask("/rerank", {"query": "red", "documents": IDS[20:32]})
        assert reply.status == 200
        found.append(hits_and_misses(server))
    gained = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(found)]
    assert gained == [(0, 12), (12, 0)]
    assert sum(found[-1]) == server.metric("edje_pairs_total")
