"""Fixtures that all test folders share: official checkpoints and bundles, made once a run."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import edje  # noqa: F401  (first of all: it switches the libraries' telemetry off)

if TYPE_CHECKING:
    from official_checkpoint import CheckpointFolders

DATA = Path(__file__).parent / "data"

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # before anything imports huggingface_hub: no test needs a network
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip `gpu` tests with the reason where none can run.

    EDJE_REQUIRE_GPU=1 fails them where the GPU is missing; a missing library still skips.
    """
    if item.get_closest_marker("gpu") is None:
        return
    from edje.kernels.device.facts import driver_fault, gpu_fault

    reason = gpu_fault()
    if reason is not None:
        is_gpu_missing = driver_fault() is not None or find_spec("cuda") is not None
        is_required = os.environ.get("EDJE_REQUIRE_GPU") == "1"
        (pytest.fail if is_required and is_gpu_missing else pytest.skip)(reason)


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


@pytest.fixture(scope="session")
def full_size_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolders:
    """Random checkpoint with the full-size scorer (12 layers, 384) and a small vision tower."""
    from official_checkpoint import FULL_SIZE_SCORER, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("full-size") / "in", FULL_SIZE_SCORER)


@pytest.fixture(scope="session")
def full_size_bundle(
    full_size_checkpoint: CheckpointFolders, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Model bundle of `full_size_checkpoint`, exported once. Read-only."""
    from edje.export.export import export_bundle

    folder = tmp_path_factory.mktemp("full-size") / "bundle"
    export_bundle(
        full_size_checkpoint.checkpoint,
        full_size_checkpoint.language_model,
        folder,
        vision_model=full_size_checkpoint.vision_model,
    )
    return folder
