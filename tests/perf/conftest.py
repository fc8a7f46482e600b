"""A pretended GPU for what is measured on one."""

import pytest

from edje.perf import gpu_contest as contest
from edje.perf.gpu_engines import manifest_of
from on_addresses import OnAddresses
from pretended_gpu import pretend_gpu


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Device memory is host memory, so both ways of an engine on a GPU run for real."""
    return pretend_gpu(monkeypatch)


@pytest.fixture
def open_float32(tiny_bundle, pretended_gpu):
    """Return what opens the tiny model's float32 engine for a profile, on the pretended GPU."""

    def opened(profile):
        manifest = manifest_of(tiny_bundle, "stand-in", "0", "fp32", profile)
        return OnAddresses(manifest, contest.torch_scorer(tiny_bundle, "cpu"))

    return opened
