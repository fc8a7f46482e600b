"""Pairs that int8 and fp8 are calibrated on: held-out scenes, each caption with its candidates.

They come from the validation drawings: neither trained on nor tested with.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..runtime.indexing.image_encoder import ImageEncoder
from ..runtime.indexing.index import index_images
from ..runtime.samples import StoreSamples
from . import scenes
from .first_stage import FirstStage

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
    (out / "images").mkdir(parents=True)
    pool = itertools.chain.from_iterable(scenes.groups(scenes.SEEDS["validation"]))
    captions = {}
    for number, scene in enumerate(itertools.islice(pool, num_images)):
        name = f"scene-{number:04}.png"
        scenes.render(scene).save(out / "images" / name)
        captions[name] = scene.caption
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
