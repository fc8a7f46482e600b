"""A real engine and a real store of the official tiny model, made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

NUM_IMAGES = 12


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
