"""A server over the tiny engine, shared by the tests that only ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from running_server import Running, running, settings_of


@pytest.fixture(scope="module")
def server(tiny_engine: Path, tiny_store: Path) -> Iterator[Running]:
    """A server whose settings are the defaults."""
    with running(settings_of(tiny_engine, tiny_store)) as started:
        yield started
