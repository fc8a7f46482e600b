"""Servers for the clients to ask: `edje serve`, started by the Python that has the package."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import KEY, PATTERN, SETUP, Case, Setup

from busy_server import busy
from edje.perf.server_process import ServerProcess


@pytest.fixture(scope="session")
def setup() -> Setup:
    """What `run.py` prepared."""
    if SETUP not in os.environ:
        pytest.exit("run them with `make test-clients`", returncode=4)
    told: Any = json.loads(Path(os.environ[SETUP]).read_text())
    cases = [Case(**case) for case in told["cases"]]
    return Setup(told["python"], Path(told["engine"]), Path(told["store"]), cases)


@pytest.fixture(params=range(3))
def case(request: Any, setup: Setup) -> Case:
    """One of a few queries, with 16 candidates of the demo."""
    return setup.cases[request.param]


@pytest.fixture
def one_case(setup: Setup) -> Case:
    """The first query, where one is enough."""
    return setup.cases[0]


@pytest.fixture(scope="session")
def url(setup: Setup) -> Iterator[str]:
    """Where a server listens that was given no options but the pattern of its ids.

    LlamaIndex puts metadata before a document's text, Haystack may; the others send ids alone.
    """
    with setup.serve("--id-pattern", PATTERN) as server:
        yield server.url


@pytest.fixture(scope="session")
def locked(setup: Setup) -> Iterator[str]:
    """Where a server listens that wants a key."""
    with setup.serve(keys=[KEY]) as server:
        yield server.url


@pytest.fixture(scope="session")
def idle_until_asked(setup: Setup) -> Iterator[ServerProcess]:
    """A server that refuses whatever would wait, a pair a batch."""
    with setup.serve("--max-wait", "0", "--max-batch", "1", "--num-threads", "1") as server:
        yield server


@pytest.fixture
def overloaded(idle_until_asked: ServerProcess, setup: Setup) -> Iterator[str]:
    """Where a server listens that has more to do than it admits."""
    every = sorted({name for case in setup.cases for name in case.ids})
    body = {"query": setup.cases[0].query, "documents": every}
    headers = {"content-type": "application/json"}
    with busy(lambda: idle_until_asked.ask("/rerank", body, headers)[0], callers=8):
        yield idle_until_asked.url
