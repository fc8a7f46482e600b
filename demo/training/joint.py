"""Stage 2: the joint encoder on the frozen tower's stored tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from .. import scenes
from .bank import GROUP, IMAGE_ID, MASK, Bank, Captions, Rows
from .loop import Run
from .models import Joint, Tower
from .tower import first_stage_order, recall

IMAGES_A_QUERY = 4  # the right one, its twin of opposite relation, one of its group, a stranger
RELATION_BIT = 2  # of a scene's number in its group (see `scenes.neighbours`)


def _false_words(captions: Captions, right: int, other: int) -> npt.NDArray[np.float32] | None:
    """For the caption `right` shown with the image of `other`: 1 for each word false of it."""
    a, b = captions.ids[right], captions.ids[other]
    if len(a) != len(b):
        return None
    return np.array([left != right for left, right in zip(a, b, strict=True)], np.float32)


class MatchingBatches:
    """Draws queries of one length class and, for each, its image, neighbours and a stranger."""

    def __init__(self, bank: Bank, captions: Captions, num_queries: int = 24):
        self.captions, self.cells, self.num_queries = captions, bank.cells, num_queries
        base = captions.lengths[::GROUP]
        self.classes = [np.flatnonzero(base < 15), np.flatnonzero(base >= 15)]
        self.some = self.classes[0]

    def draw(self, rng: np.random.Generator) -> tuple[Rows, Rows]:
        """Caption rows and image rows, each [n*4], the right image first of each four."""
        self.some = self.classes[int(rng.random() < 0.5)]
        texts, images = [], []
        for group in rng.choice(self.some, self.num_queries, replace=False):
            first = group * GROUP
            text, other = rng.choice(GROUP, 2, replace=False)
            twin = text ^ RELATION_BIT if text < scenes.GROUP else other
            stranger = int(rng.choice(self.some)) * GROUP + int(rng.integers(GROUP))
            texts += [first + text] * IMAGES_A_QUERY
            images += [first + text, first + twin, first + other, stranger]
        return np.array(texts), np.array(images)

    def draw_right(self, rng: np.random.Generator) -> Rows:
        """Rows [2n] of the same length class, to be shown with their own images."""
        chosen = rng.choice(self.some, 2 * self.num_queries)
        rows: Rows = chosen * GROUP + rng.integers(GROUP, size=len(chosen))
        return rows

    def places(self, texts: Rows, length: int) -> torch.Tensor:
        """int64 [n, length]: the cell of the thing that each word describes, else -100."""
        labels = np.full((len(texts), length), -100, np.int64)
        for row, text in zip(labels, texts, strict=True):
            row[1 : 1 + len(self.cells[text])] = self.cells[text]
        return torch.from_numpy(labels)

    def word_labels(self, texts: Rows, images: Rows, length: int) -> torch.Tensor:
        """float [n*4, length]: 1 false, 0 true, -1 not asked (strangers, other templates)."""
        labels = np.full((len(texts), length), -1, np.float32)
        for i, (text, image) in enumerate(zip(texts, images, strict=True)):
            words = (
                _false_words(self.captions, text, image)
                if text // GROUP == image // GROUP
                else None
            )
            if words is not None:
                labels[i, 1 : 1 + len(words)] = words
        return torch.from_numpy(labels)


def _masked(ids: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the caption's words masked, and the labels (-100 elsewhere)."""
    words = (ids > MASK) & (ids != IMAGE_ID)
    hide = words & torch.from_numpy(rng.random(tuple(ids.shape)) < 0.5)
    return ids.masked_fill(hide, MASK), ids.masked_fill(~hide, -100)


def joint_losses(
    joint: Joint,
    batches: MatchingBatches,
    tokens: npt.NDArray[np.float16],
    rng: np.random.Generator,
    *,
    with_places: bool,
) -> dict[str, torch.Tensor]:
    """Matching, false-word, masked-caption and, if wanted, place losses of one batch."""
    texts, images = batches.draw(rng)
    right = batches.draw_right(rng)
    ids, mask = batches.captions.joint(np.concatenate([texts, right]))
    visual = torch.from_numpy(tokens[np.concatenate([images, right])]).float()
    pairs = len(texts)
    masked_ids, masked_labels = _masked(ids[pairs:], rng)
    middle, hidden = joint.encode(torch.cat([ids[:pairs], masked_ids]), mask, visual)
    scores = joint.score(hidden[:pairs]).view(-1, IMAGES_A_QUERY)
    words = batches.word_labels(texts, images, ids.shape[1])
    false = joint.false_word(hidden[:pairs]).squeeze(-1)[words >= 0]
    answers = joint.language_model.cls(hidden[pairs:][masked_labels >= 0])
    losses = {
        "match": F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long)),
        "words": F.binary_cross_entropy_with_logits(false, words[words >= 0]) * 2,
        "masked": F.cross_entropy(answers, masked_labels[masked_labels >= 0]),
    }
    if with_places:
        shown = torch.cat([middle[:pairs:IMAGES_A_QUERY], middle[pairs:]])
        places = batches.places(np.concatenate([texts[::IMAGES_A_QUERY], right]), ids.shape[1])
        losses["places"] = F.cross_entropy(joint.place(shown).flatten(0, 1), places.flatten())
    return losses


@torch.no_grad()
def rerank_ranks(
    joint: Joint,
    captions: Captions,
    tokens: npt.NDArray[np.float16],
    order: Rows,
    queries: Rows,
    num_candidates: int,
) -> Rows:
    """Rank of the right image among the first stage's candidates (a miss counts as last)."""
    ranks = []
    for query in queries:
        candidates = order[query, :num_candidates]
        ids, mask = captions.joint(np.full(len(candidates), query))
        visual = torch.from_numpy(tokens[candidates]).float()
        scores = joint.score(joint.encode(ids, mask, visual)[1]).numpy()
        ranked = candidates[np.argsort(-scores, kind="stable")]
        found = np.flatnonzero(ranked == query)
        ranks.append(int(found[0]) if len(found) else len(order))
    return np.array(ranks)


def train_joint(
    work: Path, bank: Bank, validation: Bank, tower: Tower, steps: dict[str, int]
) -> Joint:
    """Stages 2 and 3 on the frozen tower's tokens; `steps` names and counts them."""
    cache = work / "tokens.npy"
    if not cache.exists():
        np.save(cache, tower.tokens(bank.pixels))
    tokens = np.load(cache)
    captions, validation_captions = Captions(bank.captions), Captions(validation.captions)
    validation_tokens = tower.tokens(validation.pixels)
    order = first_stage_order(tower, validation)
    torch.manual_seed(1)
    joint = Joint()

    def evaluate() -> str:
        queries = np.arange(0, len(order), 3)
        ranks = rerank_ranks(joint, validation_captions, validation_tokens, order, queries, 20)
        return "validation, 20 candidates: " + recall(ranks)

    batches = MatchingBatches(bank, captions)
    for stage, count in steps.items():
        losses = partial(joint_losses, joint, batches, tokens, with_places=stage == "places")
        run = Run(stage, work, joint, 7e-4, count)
        run.train(losses, evaluate, every=25, evaluate_every=250)
    return joint.eval()
