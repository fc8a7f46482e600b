"""Stage 2: the joint encoder on the frozen tower's stored tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from .bank import GROUP, IMAGE_ID, MASK, Bank, Captions, Rows
from .loop import Run
from .models import Joint, Tower
from .tower import first_stage_order, recall


def _false_words(captions: Captions, right: int, other: int) -> npt.NDArray[np.float32] | None:
    """For the caption `right` shown with the image of `other`: 1 for each word false of it."""
    a, b = captions.ids[right], captions.ids[other]
    if len(a) != len(b):
        return None
    return np.array([left != right for left, right in zip(a, b, strict=True)], np.float32)


class MatchingBatches:
    """Draws queries of one length class and, for each, its image, neighbours and a stranger."""

    def __init__(self, bank: Bank, captions: Captions, num_queries: int = 24):
        self.captions, self.num_queries = captions, num_queries
        base = captions.lengths[::GROUP]
        self.classes = [np.flatnonzero(base < 15), np.flatnonzero(base >= 15)]

    def draw(self, rng: np.random.Generator) -> tuple[Rows, ...]:
        """Caption rows [n*5] and image rows [n*5], the right image first of each five."""
        some = self.classes[int(rng.random() < 0.5)]
        chosen = rng.choice(some, self.num_queries, replace=False)
        texts, images = [], []
        for group in chosen:
            members = group * GROUP + rng.permutation(GROUP)
            stranger = int(rng.choice(some)) * GROUP + int(rng.integers(GROUP))
            texts += [members[0]] * 5
            images += [*members[:4], stranger]
        return np.array(texts), np.array(images)

    def word_labels(self, texts: Rows, images: Rows, length: int) -> torch.Tensor:
        """float [n*5, length]: 1 false, 0 true, -1 not asked (strangers, other templates)."""
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
) -> dict[str, torch.Tensor]:
    """Matching, false-word and masked-caption losses of one batch."""
    texts, images = batches.draw(rng)
    ids, mask = batches.captions.joint(texts)
    visual = torch.from_numpy(tokens[images]).float()
    masked_ids, masked_labels = _masked(ids[::5], rng)
    hidden = joint.encode(
        torch.cat([ids, masked_ids]), torch.cat([mask, mask[::5]]), torch.cat([visual, visual[::5]])
    )
    pairs = len(ids)
    scores = joint.score(hidden[:pairs]).view(-1, 5)
    words = batches.word_labels(texts, images, ids.shape[1])
    asked = words >= 0
    false = joint.false_word(hidden[:pairs]).squeeze(-1)[asked]
    answers = joint.language_model.cls(hidden[pairs:][masked_labels >= 0])
    return {
        "match": F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long)),
        "words": F.binary_cross_entropy_with_logits(false, words[asked]) * 2,
        "masked": F.cross_entropy(answers, masked_labels[masked_labels >= 0]) * 0.5,
    }


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
        scores = joint.score(joint.encode(ids, mask, visual)).numpy()
        ranked = candidates[np.argsort(-scores, kind="stable")]
        found = np.flatnonzero(ranked == query)
        ranks.append(int(found[0]) if len(found) else len(order))
    return np.array(ranks)


def train_joint(work: Path, bank: Bank, validation: Bank, tower: Tower, steps: int) -> Joint:
    """Stage 2 on the frozen tower's tokens."""
    cache = work / "tokens.npy"
    if not cache.exists():
        np.save(cache, tower.tokens(bank.pixels))
    tokens = np.load(cache)
    captions, validation_captions = Captions(bank.captions), Captions(validation.captions)
    validation_tokens = tower.tokens(validation.pixels)
    order = first_stage_order(tower, validation)
    torch.manual_seed(1)
    joint = Joint()
    run = Run("joint", work, joint, 7e-4, steps)
    batches = MatchingBatches(bank, captions)

    def evaluate() -> str:
        queries = np.arange(0, len(order), 3)
        ranks = rerank_ranks(joint, validation_captions, validation_tokens, order, queries, 20)
        return "validation, 20 candidates: " + recall(ranks)

    run.train(
        lambda rng: joint_losses(joint, batches, tokens, rng),
        evaluate,
        every=25,
        evaluate_every=250,
    )
    return joint.eval()
