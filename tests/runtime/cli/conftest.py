"""The command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from edje.runtime.cli.app import main


class Ran(NamedTuple):
    """What one call gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def edje(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line: `edje("store", "stat", path)`; no call may end in a traceback."""

    def call(*args: object) -> Ran:
        capfd.readouterr()
        ran = Ran(main([str(arg) for arg in args]), *capfd.readouterr())
        assert "Traceback" not in ran.err
        return ran

    return call
