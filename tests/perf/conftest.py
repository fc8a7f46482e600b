"""A pretended GPU for what is measured on one, and a small random model."""

import pytest

from edje.export.export import export_bundle
from edje.perf import gpu_contest as contest
from edje.perf import random_model
from edje.perf.gpu_engines import manifest_of
from on_addresses import OnAddresses
from pretended_gpu import pretend_gpu

SMALL = {
    "HIDDEN": 48,
    "NUM_LAYERS": 2,
    "NUM_HEADS": 4,
    "INTERMEDIATE": 96,
    "NUM_WORDS": 60,
    "NUM_POSITIONS": 160,
}


@pytest.fixture
def small_model(monkeypatch, tmp_path):
    """The random model's bundle with two layers, width 48 and few words; only sizes differ."""
    for name, value in SMALL.items():
        monkeypatch.setattr(random_model, name, value)
    checkpoint, language_model = random_model.write_checkpoint(tmp_path)
    export_bundle(checkpoint, language_model, tmp_path / "bundle")
    return tmp_path / "bundle"


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


@pytest.fixture
def small_roof(monkeypatch):
    """Let the roof be measured by products and copies that take no time."""
    sizes = {"M": 8, "K": 64, "N": 16, "COPY_BYTES": 1 << 16, "SLOT_BYTES": 1 << 12}
    for name, value in sizes.items():
        monkeypatch.setattr(f"edje.perf.roof.{name}", value)
