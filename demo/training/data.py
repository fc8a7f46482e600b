"""Rendered scenes with their captions and dense labels, and captions as token ids."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from .. import scenes, tiny_model
from ..tiny_model import NUM_TOKENS

NUM_EXTRA = 2
GROUP = scenes.GROUP + NUM_EXTRA
CLS, SEP, MASK = 2, 3, 4
IMAGE_ID = len(tiny_model.vocabulary())
Uint8 = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]


@dataclass
class Bank:
    """Rendered scenes in groups of GROUP (the base first) with captions and dense labels."""

    pixels: Uint8  # [N, 72, 72, 3]
    labels_tower: npt.NDArray[np.int8]  # [N, 81, 6]
    labels_tokens: npt.NDArray[np.int8]  # [N, 64, 6]
    captions: list[str]
    cells: list[list[int]]  # of every caption's words: the cell (0..8) of its thing, else -100


def _dense_labels(scene: scenes.Scene, grid: int) -> npt.NDArray[np.int8]:
    cells = scenes.cell_labels(scene, grid).astype(int)
    things = [
        (1 + list(scenes.COLORS).index(t.color), scenes.SHAPES.index(t.shape),
         scenes.SIZES.index(t.size)) for t in scene.things
    ]  # fmt: skip
    table = np.array([(0, -100, -100), *things])
    rows, columns = np.mgrid[:grid, :grid]
    ground = np.full_like(cells, list(scenes.BACKGROUNDS).index(scene.background))
    labels = np.concatenate([table[cells], np.stack([ground, rows, columns], -1)], -1)
    return labels.reshape(grid * grid, 6).astype(np.int8)


def _word_cells(scene: scenes.Scene) -> list[int]:
    """Where the thing stands that a word describes, a number a word; -100 for other words."""
    gaps = [len(relation.split()) for relation in scene.relations] + [4]  # "on a ... background"
    labels: list[int] = []
    for (row, column), gap in zip(scene.cells, gaps, strict=True):
        labels += [-100, *[3 * row + column] * 3, *[-100] * gap]  # "a", size, colour, shape
    return labels


def _pixels(scene: scenes.Scene, *, supersample: int) -> Uint8:
    """Draw at 288 and shrink as the image processor does."""
    picture = scenes.render(scene, supersample=supersample)
    size = (tiny_model.IMAGE_SIZE,) * 2
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))


def make_bank(seed: int, num_groups: int, *, num_extra: int, supersample: int) -> Bank:
    """Render `num_groups` groups of scenes from `seed`."""
    every = [
        scene
        for group in itertools.islice(scenes.groups(seed, num_extra=num_extra), num_groups)
        for scene in group
    ]
    return Bank(
        np.stack([_pixels(scene, supersample=supersample) for scene in every]),
        np.stack([_dense_labels(scene, tiny_model.GRID) for scene in every]),
        np.stack([_dense_labels(scene, 8) for scene in every]),
        [scene.caption for scene in every],
        [_word_cells(scene) for scene in every],
    )


def normalized(pixels: Uint8) -> torch.Tensor:
    """uint8 [N, R, R, 3] -> float32 [N, 3, R, R] in -1..1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


class Captions:
    """Tokenised captions: wordpieces without specials, one a word."""

    def __init__(self, captions: list[str]):
        tokenizer = tiny_model.make_tokenizer()
        encodings = tokenizer.encode_batch(captions, add_special_tokens=False)
        self.ids = [encoding.ids for encoding in encodings]
        self.lengths = np.array([len(ids) for ids in self.ids])

    def first_stage(self, rows: Rows) -> torch.Tensor:
        """[CLS] text [SEP], padded to the first stage's fixed length."""
        out = np.zeros((len(rows), tiny_model.MAX_FIRST_STAGE_TEXT), np.int64)
        for i, row in enumerate(rows):
            ids = [CLS, *self.ids[row], SEP]
            out[i, : len(ids)] = ids
        return torch.from_numpy(out)

    def joint(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """[CLS] text [SEP] <image>*64 [SEP], right-padded, and its attention mask."""
        padded = NUM_TOKENS + 3 + int(self.lengths[rows].max())
        out = np.zeros((len(rows), padded), np.int64)
        for i, row in enumerate(rows):
            pair = [CLS, *self.ids[row], SEP, *[IMAGE_ID] * NUM_TOKENS, SEP]
            out[i, : len(pair)] = pair
        mask = np.arange(padded) < (self.lengths[rows] + NUM_TOKENS + 3)[:, None]
        return torch.from_numpy(out), torch.from_numpy(mask).long()
