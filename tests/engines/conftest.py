"""Engines built once a run from the fixture bundle, and the official pairs as batches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edje.engines.builder.build import build_engine
from edje.engines.contract import Batch, Engine
from edje.engines.fidelity import InlineStream
from edje.engines.registry import open_engine

BACKENDS = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class OfficialPairs:
    """What the official code scored: captions' ids, float16 tokens [N, m, H], scores [C, N]."""

    caption_ids: list[list[int]]
    tokens: np.ndarray
    scores: np.ndarray

    def batch(self, pairs: Sequence[tuple[int, int]], bucket: int) -> Batch:
        """Return (caption, image) pairs as one batch; each caption is one query."""
        captions = sorted({caption for caption, _ in pairs})
        text_ids = np.zeros((len(captions), bucket), np.int32)
        for row, caption in enumerate(captions):
            ids = self.caption_ids[caption]
            text_ids[row, : len(ids)] = ids
        lengths = [len(self.caption_ids[caption]) for caption in captions]
        queries = [captions.index(caption) for caption, _ in pairs]
        images = [image for _, image in pairs]
        return Batch(
            text_ids=text_ids,
            text_length=np.array(lengths, np.int32),
            query_of_pair=np.array(queries, np.int32),
            visual_tokens=np.ascontiguousarray(self.tokens[images]),
        )

    def expected(self, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        return np.array([self.scores[pair] for pair in pairs], np.float32)


@pytest.fixture(scope="session")
def official_pairs(official_tiny: Path) -> OfficialPairs:
    captions = json.loads((official_tiny / "captions.json").read_text(encoding="utf-8"))
    image_id = captions["image_token_id"]
    ids = [pair[: pair.index(image_id)] for pair in captions["pair_input_ids"]]
    with np.load(official_tiny / "expected.npz") as expected:
        tokens = expected["compressed_tokens"].astype(np.float16)
        return OfficialPairs(ids, tokens, expected["scores_from_fp16_tokens"])


@pytest.fixture(scope="session")
def built_engines(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One float32 engine folder a backend. Tests that change a folder take `engine_folder`."""
    root = tmp_path_factory.mktemp("engines")
    for backend in BACKENDS:
        build_engine(tiny_bundle, root / backend, backend=backend, precision="fp32")
    return {backend: root / backend for backend in BACKENDS}


@pytest.fixture(scope="session", params=BACKENDS)
def engine(request: pytest.FixtureRequest, built_engines: dict[str, Path]):
    engine = open_engine(built_engines[request.param])
    yield engine
    engine.close()


@pytest.fixture(params=BACKENDS)
def engine_folder(
    request: pytest.FixtureRequest, built_engines: dict[str, Path], tmp_path: Path
) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(built_engines[request.param], tmp_path / "engine"))


@pytest.fixture(scope="session")
def run() -> Callable[[Engine, Batch], np.ndarray]:
    """Score one batch on the calling thread."""

    def run(engine: Engine, batch: Batch) -> np.ndarray:
        scores = np.full(len(batch), np.nan, np.float32)
        engine.enqueue(batch, scores, stream=InlineStream())
        return scores

    return run
