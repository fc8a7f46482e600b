"""Fixtures that all test folders share: the official tiny checkpoint and bundles made once."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def official_tiny() -> Path:
    """Folder with a tiny checkpoint in the official layout and the official code's outputs."""
    return DATA / "official_tiny"


@pytest.fixture(scope="session")
def tiny_bundle(official_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model bundle of `official_tiny`, exported once. Read-only: tests must copy to change it."""
    from edje.export.export import export_bundle

    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle(
        official_tiny / "checkpoint_16.pth",
        official_tiny / "lm",
        folder,
        vision_model=official_tiny / "siglip",
    )
    return folder
