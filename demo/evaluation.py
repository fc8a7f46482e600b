"""The demo's first stage, calibration pairs, and the figures of both stages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import SiglipModel

from ..arrays import Float32
from ..bundle import BundleManifest, ImageSpec
from ..engines.image import ImageEncoder
from ..errors import EdjeError
from ..runtime.indexing.images import Unreadable, decode_image
from ..runtime.indexing.index import index_images
from ..runtime.queries import StoreSamples
from . import scenes
from .tiny_model import MAX_FIRST_STAGE_TEXT, State, make_tokenizer, official_layout, siglip_config

NUM_IMAGES = 512
NUM_QUERIES = 32
NUM_CANDIDATES = 32
SEED = 0


def samples(
    bundle: Path, out: Path, stage: FirstStage, num_images: int = NUM_IMAGES
) -> StoreSamples:
    """Draw, index and open the calibration pairs in the folder `out`.

    `out` gets `images`, `scenes.store` and `queries.jsonl`: what `edje build` takes as
    `--calibration-store` and `--calibration-queries`, and `edje verify` as `--store` and
    `--queries`. Candidates are the first stage's: what a scorer ranks in earnest, and harder to
    tell apart than strangers.
    """
    captions = scenes.draw_pool(scenes.SEEDS["validation"], num_images, out / "images")
    index_images(ImageEncoder.open(bundle), out / "images", out / "scenes.store")
    drawn = np.random.default_rng(SEED).permutation(len(captions))[:NUM_QUERIES]
    names = list(captions)
    asked = {names[number]: captions[names[number]] for number in sorted(drawn.tolist())}
    images = [out / "images" / name for name in names]
    order = stage.candidates(images, list(asked.values()), bundle)[:, :NUM_CANDIDATES]
    write_queries(out / "queries.jsonl", asked, [[names[i] for i in row] for row in order])
    return StoreSamples.open(out / "scenes.store", bundle, out / "queries.jsonl")


def write_queries(
    path: Path, captions: Mapping[str, str], candidates: Iterable[Sequence[str]]
) -> None:
    """Write captions with their image's name and candidates, as `edje verify` reads them."""
    with path.open("w", encoding="utf-8") as file:
        for (name, caption), ids in zip(captions.items(), candidates, strict=True):
            entry = {"query": caption, "target": name, "candidates": list(ids)}
            file.write(json.dumps(entry) + "\n")


class FirstStage:
    """Embeds images and captions; the dot product of two embeddings ranks candidates."""

    def __init__(self, state: State):
        self._model = SiglipModel(siglip_config()).eval()
        clip = {k.removeprefix("clip."): v for k, v in official_layout(state).items()}
        wanted = self._model.state_dict().keys()
        self._model.load_state_dict({key: clip[key] for key in wanted})
        self._tokenizer = make_tokenizer()
        length = MAX_FIRST_STAGE_TEXT
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length)

    @torch.inference_mode()
    def embed_images(self, paths: Sequence[Path], spec: ImageSpec, batch: int = 128) -> Float32:
        """Return unit vectors float32 [N, H] of image files."""
        parts = []
        for start in range(0, len(paths), batch):
            pixels = np.stack([_pixels(path, spec) for path in paths[start : start + batch]])
            out = self._model.vision_model(pixel_values=torch.from_numpy(pixels))
            parts.append(F.normalize(out.pooler_output, dim=-1).numpy())
        return np.concatenate(parts)

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[str]) -> Float32:
        """Return unit vectors float32 [N, H] of captions."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(captions))]
        out = self._model.text_model(input_ids=torch.tensor(ids))
        vectors: Float32 = F.normalize(out.pooler_output, dim=-1).numpy()
        return vectors

    def candidates(
        self, images: Sequence[Path], captions: Sequence[str], bundle: Path
    ) -> npt.NDArray[np.int64]:
        """Return every caption's images, best first: int64 [captions, images]."""
        spec = BundleManifest.read(bundle).image
        if spec is None:
            raise EdjeError("the demo's bundle has no image encoder, expected one")
        similarity = self.embed_captions(captions) @ self.embed_images(images, spec).T
        return np.argsort(-similarity, axis=1, kind="stable")


def _pixels(path: Path, spec: ImageSpec) -> Float32:
    pixels = decode_image(path, spec)
    if isinstance(pixels, Unreadable):
        raise EdjeError(f"{path} cannot be read: {pixels.reason}")
    return pixels


CUTOFFS = (1, 5, 10)


@dataclass(frozen=True, slots=True)
class QueryResult:
    """One query: its right image, the first stage's candidates and their order after reranking."""

    caption: str
    target: str
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepTime:
    """Wall seconds of one step, and what it made."""

    name: str
    seconds: float
    detail: str


@dataclass(slots=True)
class DemoResult:
    """Everything the table, the page and `demo.json` show."""

    queries: list[QueryResult] = field(default_factory=list)
    steps: list[StepTime] = field(default_factory=list)
    num_candidates: int = 0
    num_images: int = 0
    pairs_per_s: float = 0.0
    bytes_per_image: int = 0
    engine: str = ""
    trials: list[dict[str, Any]] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Time a step; what the block appends to the list becomes its detail."""
        detail: list[str] = []
        began = perf_counter()
        yield detail
        self.steps.append(StepTime(name, perf_counter() - began, ", ".join(detail)))

    def recalls(self) -> dict[str, dict[str, float]]:
        """Return recall in percent by stage and cutoff."""
        targets = [query.target for query in self.queries]
        return {
            "first stage": recall([query.before for query in self.queries], targets),
            "reranked": recall([query.after for query in self.queries], targets),
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `demo.json`; single queries are left out."""
        values = asdict(self)
        del values["queries"]
        for step in values["steps"]:
            step["seconds"] = round(step["seconds"], 2)
        return {**values, "num_queries": len(self.queries), "recall": self.recalls()}


def recall(orders: Sequence[Sequence[str]], targets: Sequence[str]) -> dict[str, float]:
    """Percent of targets among the first 1, 5, 10 and all of their order."""
    found = {
        f"R@{k}": sum(target in order[:k] for order, target in zip(orders, targets, strict=True))
        for k in (*CUTOFFS, max((len(order) for order in orders), default=0))
    }
    return {name: 100 * count / max(1, len(targets)) for name, count in found.items()}


def spread(queries: Sequence[QueryResult], count: int) -> list[QueryResult]:
    """Pick `count` queries at even distances: shown as they come, not the prettiest."""
    count = min(count, len(queries))
    return [queries[(2 * i + 1) * len(queries) // (2 * count)] for i in range(count)]
