"""Fixtures that all test folders share: official checkpoints, bundles, an engine, a store."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import edje  # noqa: F401  (first of all: it switches the libraries' telemetry off)

if TYPE_CHECKING:
    from interpreted_kernels import Interpreter
    from official_checkpoint import CheckpointFolders

NUM_IMAGES = 12  # of `tiny_store`
DATA = Path(__file__).parent / "data"
collect_ignore = ["clients"]  # they have environments of their own: `make test-clients`

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
def interpreted() -> Iterator[Interpreter]:
    """What runs our kernels' sources on the CPU: by itself, or for a `RecordingDevice`."""
    if sys.platform != "linux":
        pytest.skip("Triton is made for Linux only")
    from interpreted_kernels import interpreter

    with interpreter() as started:
        yield started


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


@pytest.fixture(scope="session")
def tiny_engine(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engine folder (openvino, fp32, with image encoder) of `tiny_bundle`. Read-only."""
    from edje.engines.builder.build import build_engine
    from edje.engines.builder.options import EngineOptions

    folder = tmp_path_factory.mktemp("tiny-engine") / "engine"
    options = EngineOptions(image_encoder=True)
    build_engine(tiny_bundle, folder, backend="openvino", precision="fp32", options=options)
    return folder


@pytest.fixture(scope="session")
def tiny_store(
    tiny_bundle: Path, official_tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Store with the official compressed tokens of `img-0` .. `img-11`. Read-only."""
    from edje.bundle import BundleManifest
    from edje.runtime.store import TokenStore

    manifest = BundleManifest.read(tiny_bundle)
    folder = tmp_path_factory.mktemp("tiny-store") / "store"
    tokens = np.load(official_tiny / "expected.npz")["compressed_tokens"].astype(np.float16)
    with TokenStore.create(
        folder,
        num_tokens=manifest.sizes.num_tokens,
        hidden=manifest.sizes.hidden,
        fingerprint_encoder=manifest.fingerprint_encoder,
    ) as store:
        store.append([f"img-{i}" for i in range(NUM_IMAGES)], tokens)
    return folder
