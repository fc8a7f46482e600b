"""An engine, and a source of tokens, that take no time: what is left of a run is our own cost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from ..arrays import Array, Float16, Float32, Int64
from ..bundle import TOKENIZER, BundleManifest
from ..engines.contract import Batch, HostEngine
from ..engines.manifest import EngineManifest, Profile
from ..runtime.store import BadRecord

FREE = "none"  # the backend's name in the manifest


class FreeEngine(HostEngine):
    """A pair's score is the first value of its first token."""

    def _infer(self, batch: Batch, scores: Float32) -> None:
        scores[:] = batch.visual_tokens[:, 0, 0]

    def close(self) -> None:
        """Nothing to free."""


class OneValue:
    """Of each record it writes the first value only: the row's number modulo 1,000."""

    def read(
        self,
        rows: Int64,
        out: Array,
        scales: Float16 | None = None,
        *,
        bad: Literal["mark"] = "mark",
    ) -> list[BadRecord]:
        """Write row % 1000 as the first value of each record."""
        out[:, 0, 0] = rows % 1000
        return []

    def prefetch(self, rows: Int64) -> None:
        """Nothing to fetch."""


def one_value(rows: Int64) -> Callable[[Int64], Float32]:
    """Return what scores candidates, by their positions in `rows`, as both give them."""
    return lambda positions: (rows[positions] % 1000).astype(np.float32)


def free_manifest(bundle: BundleManifest, profile: Profile) -> EngineManifest:
    """Return the manifest of an engine of `bundle` that nobody built; it takes float16 tokens."""
    return EngineManifest(
        backend=FREE,
        backend_version="0",
        precision="fp32",
        device={"kind": "cpu"},
        profile=profile,
        bundle=bundle,
        bundle_path="",
        onnx_sha256="",
        precision_plan={},
        layers=bundle.sizes.num_layers,
        token_dtype="float16",
        files={},
        build_options={},
        build_seconds=0.0,
        fidelity={},
    )


def write_free_engine(bundle: Path, folder: Path, profile: Profile) -> Path:
    """Write what `serve_free` and `open_free` need of an engine folder: manifest and tokenizer.

    Raises:
        CheckpointError: `bundle` is no model bundle.
    """
    folder.mkdir(parents=True)
    free_manifest(BundleManifest.read(bundle), profile).write(folder)
    shutil.copyfile(bundle / TOKENIZER, folder / TOKENIZER)
    return folder
