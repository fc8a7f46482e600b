"""A bundle of three layers: one can be left out of it, and two."""

from pathlib import Path

import pytest

from edje.bundle import BundleManifest
from edje.export.export import export_bundle
from official_checkpoint import Sizes, write_checkpoint


@pytest.fixture(scope="session")
def deep_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model bundle of three layers with random weights. Read-only."""
    folder = tmp_path_factory.mktemp("deep")
    made = write_checkpoint(folder / "in", Sizes())
    models = made.checkpoint, made.language_model
    export_bundle(*models, folder / "bundle", vision_model=made.vision_model)
    return folder / "bundle"


@pytest.fixture(scope="session")
def bundle(deep_bundle: Path) -> BundleManifest:
    return BundleManifest.read(deep_bundle)
