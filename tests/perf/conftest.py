"""A pretended GPU for what is measured on one."""

import pytest

from pretended_gpu import pretend_gpu


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Device memory is host memory, so both ways of an engine on a GPU run for real."""
    return pretend_gpu(monkeypatch)
