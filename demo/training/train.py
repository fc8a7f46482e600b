"""Training: steps with checkpoints that resume, the vision tower, and the joint encoder's loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from .. import scenes
from .data import GROUP, IMAGE_ID, MASK, Bank, Captions, Rows, normalized
from .models import Joint, Tower

Losses = Callable[[np.random.Generator], dict[str, torch.Tensor]]


def schedule(step: int, total: int, *, warmup: int = 100) -> float:
    """Learning-rate factor: warm-up, constant, then linear to zero over the last 40 %."""
    return min(1.0, (step + 1) / warmup, (total - step) / (0.4 * total))


class Run:
    """One stage's loop: optimiser, checkpoints in the work folder, a line of log a while."""

    def __init__(self, name: str, work: Path, model: nn.Module, lr: float, total: int):
        self.name, self.path, self.model, self.total = name, work / f"{name}.pt", model, total
        self.log = work / "log.txt"
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98)
        )
        self.lr, self.step, self.seconds = lr, 0, 0.0
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)

    def say(self, text: str) -> None:
        line = f"{self.name} {self.step}/{self.total} {self.seconds:.0f}s {text}"
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(line + "\n")

    def train(
        self, losses: Losses, evaluate: Callable[[], str], *, every: int, evaluate_every: int
    ) -> None:
        """`losses(rng)` gives named losses; a step's rng follows from its number alone."""
        sums: dict[str, float] = {}
        while self.step < self.total:
            started = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * schedule(self.step, self.total)
            parts = losses(np.random.default_rng([7, self.step]))
            self.optimizer.zero_grad(set_to_none=True)
            torch.stack(list(parts.values())).sum().backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            self.seconds += time.perf_counter() - started
            for key, value in parts.items():
                sums[key] = sums.get(key, 0.0) + value.item() / every
            if self.step % every == 0:
                self.say(" ".join(f"{key} {value:.4f}" for key, value in sums.items()))
                sums = {}
                self.save()
            if self.step % evaluate_every == 0 or self.step == self.total:
                self.say(evaluate())
        self.save()


def recall(ranks: npt.NDArray[np.int64]) -> str:
    """Ranks (0 is first) as R@1/5/10/50 in percent."""
    return " ".join(f"R@{k} {100 * (ranks < k).mean():.1f}" for k in (1, 5, 10, 50))


def first_stage_order(tower: Tower, bank: Bank) -> npt.NDArray[np.int64]:
    """Images by falling similarity for every caption: int64 [N captions, N images]."""
    captions = Captions(bank.captions)
    with torch.no_grad():
        rows = np.arange(len(bank.captions))
        texts = tower.texts(captions.first_stage(rows))
        parts = [normalized(bank.pixels[i : i + 200]) for i in range(0, len(rows), 200)]
        images = torch.cat([tower.images(part)[1] for part in parts])
    return (-(texts @ images.T)).argsort(dim=1, stable=True).numpy()


def train_tower(work: Path, bank: Bank, validation: Bank, steps: int, batch: int = 128) -> Tower:
    """Stage 1; returns the frozen towers and adapter."""
    torch.manual_seed(0)
    tower = Tower()
    captions = Captions(bank.captions)
    run = Run("tower", work, tower, 1e-3, steps)

    def losses(rng: np.random.Generator) -> dict[str, torch.Tensor]:
        rows = rng.choice(len(bank.captions), batch, replace=False)
        features, images = tower.images(normalized(bank.pixels[rows]))
        texts = tower.texts(captions.first_stage(rows))
        logits = images @ texts.T * tower.siglip.logit_scale.exp() + tower.siglip.logit_bias
        signs = 2 * torch.eye(batch) - 1
        tokens = tower.adapter(features)
        return {
            "tower": tower.head_tower(features, torch.from_numpy(bank.labels_tower[rows]).long()),
            "tokens": tower.head_tokens(tokens, torch.from_numpy(bank.labels_tokens[rows]).long()),
            "sigmoid": -F.logsigmoid(signs * logits).sum() / batch,
        }

    def evaluate() -> str:
        order = first_stage_order(tower, validation)
        return recall((order == np.arange(len(order))[:, None]).argmax(1))

    run.train(losses, evaluate, every=25, evaluate_every=200)
    return tower.eval().requires_grad_(False)


IMAGES_A_QUERY = 4  # the right one, its twin of opposite relation, one of its group, a stranger
RELATION_BIT = 2  # of a scene's number in its group (see `scenes.neighbours`)


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
        labels, ids = np.full((len(texts), length), -1, np.float32), self.captions.ids
        for row, text, image in zip(labels, texts, images, strict=True):
            shown, true = ids[text], ids[image]
            if text // GROUP == image // GROUP and len(shown) == len(true):
                row[1 : 1 + len(shown)] = np.not_equal(shown, true)
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
