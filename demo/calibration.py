"""Pairs that int8 and fp8 are calibrated on: held-out scenes, each caption with its neighbours.

They come from the validation drawings: neither trained on nor tested with.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from ..runtime.image_encoder import ImageEncoder
from ..runtime.index import index_images
from ..runtime.samples import StoreSamples
from . import scenes

NUM_IMAGES = 256
NUM_QUERIES = 48
NUM_CANDIDATES = 24
SEED = 0


def samples(bundle: Path, out: Path) -> StoreSamples:
    """Draw, index and open the calibration pairs in the folder `out`.

    `out` gets `images`, `scenes.store` and `queries.jsonl`: what `edje build` takes as
    `--calibration-store` and `--calibration-queries`, and `edje verify` as `--store` and
    `--queries`. Every query ranks its own group of eight and strangers.
    """
    (out / "images").mkdir(parents=True)
    pool = itertools.chain.from_iterable(scenes.groups(scenes.SEEDS["validation"]))
    captions = {}
    for number, scene in enumerate(itertools.islice(pool, NUM_IMAGES)):
        name = f"scene-{number:04}.png"
        scenes.render(scene).save(out / "images" / name)
        captions[name] = scene.caption
    index_images(ImageEncoder.open(bundle), out / "images", out / "scenes.store")
    _write_queries(captions, out / "queries.jsonl")
    return StoreSamples.open(out / "scenes.store", bundle, out / "queries.jsonl")


def _write_queries(captions: dict[str, str], path: Path) -> None:
    random = np.random.default_rng(SEED)
    names = list(captions)
    lines = []
    for number in sorted(random.permutation(len(names))[:NUM_QUERIES].tolist()):
        first = number // scenes.GROUP * scenes.GROUP
        group = names[first : first + scenes.GROUP]
        others = [name for name in names if name not in group]
        drawn = random.permutation(len(others))[: NUM_CANDIDATES - len(group)].tolist()
        entry = {
            "query": captions[names[number]],
            "target": names[number],
            "candidates": group + [others[place] for place in drawn],
        }
        lines.append(json.dumps(entry))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
