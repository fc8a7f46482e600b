"""Every stage of a ranking under pytest-benchmark: `speed_plugin.py` says how to run it."""

from __future__ import annotations

from collections.abc import Callable


def test_stage(measured: Callable[[], None]) -> None:
    """Measure a stage, then check what it gave."""
    measured()
