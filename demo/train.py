"""Train the tiny EDJE model on scenes: `python -m edje.demo.train --work .train`.

Two stages, both resumable (the same command continues where it was stopped):

1. *Tower.* The vision tower, the adapter and the first-stage text tower learn together: what
   lies under every square (the renderer knows: colour, shape, size, place) read from the
   tower's features and from the adapter's 64 tokens, plus SigLIP's sigmoid loss between
   images and captions. Then all three are frozen and every scene's tokens are computed once.
2. *Joint encoder.* On those tokens, in float16 as a store holds them: softmax matching of a
   caption over {its image, hard neighbours, a random image}, masked captions (50 %), and for
   each word of a neighbour's pair whether it is false of that image.

Losses beyond EDJE's own (dense labels, false words) have heads that are thrown away.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import BertForMaskedLM, SiglipModel

from . import scenes, tiny_model
from .tiny_model import HIDDEN, NUM_TOKENS

TRAIN_SEED, VALIDATION_SEED, TEST_SEED = 1, 2, 3
NUM_EXTRA = 2
GROUP = 4 + NUM_EXTRA
CLS, SEP, MASK = 2, 3, 4
IMAGE_ID = len(tiny_model.vocabulary())
Uint8 = npt.NDArray[np.uint8]


class Adapter(nn.Module):
    """The token-compression adapter with the official tensor names, before any folding."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, NUM_TOKENS, HIDDEN))
        self.key = nn.Linear(HIDDEN, HIDDEN)
        self.value = nn.Linear(HIDDEN, HIDDEN)
        self.attention = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)
        self.layernorm = nn.LayerNorm(HIDDEN, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(HIDDEN, tiny_model.ADAPTER_INTERMEDIATE),
                "fc2": nn.Linear(tiny_model.ADAPTER_INTERMEDIATE, HIDDEN),
            }
        )
        self.projection = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        query = self.query.expand(len(features), -1, -1)
        keys, values = self.key(features), self.value(features)
        attended, _ = self.attention(query, keys, values, need_weights=False)
        hidden = F.gelu(self.mlp["fc1"](self.layernorm(attended)))
        return self.projection(attended + self.mlp["fc2"](hidden))  # type: ignore[no-any-return]


class DenseHead(nn.Module):
    """Reads what lies under a square (colour, shape, size), its place, and the background."""

    SPLITS = (len(scenes.COLORS) + 1, len(scenes.SHAPES), len(scenes.SIZES), 3, 9, 9)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, sum(self.SPLITS))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """tokens [B, n, H], labels int [B, n, 6] with -100 where nothing is asked."""
        parts = self.linear(tokens).split(self.SPLITS, dim=-1)
        losses = [
            F.cross_entropy(part.flatten(0, 1), labels[..., i].flatten())
            for i, part in enumerate(parts)
        ]
        return torch.stack(losses).sum()


class Joint(nn.Module):
    """The joint encoder with its matching head, and the heads that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        config = tiny_model.bert_config()
        self.language_model = BertForMaskedLM(config)
        self.language_model.resize_token_embeddings(IMAGE_ID + 1, mean_resizing=False)
        self.pooler = nn.Linear(HIDDEN, HIDDEN)
        self.classifier = nn.Linear(HIDDEN, 1)
        self.false_word = nn.Linear(HIDDEN, 1)

    def encode(self, ids: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, L, H]; `tokens` [B, 64, H] take the places of `<image>`."""
        embeddings = self.language_model.get_input_embeddings()(ids)
        image = (ids == IMAGE_ID).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(image, tokens.to(embeddings.dtype))
        first = ((ids == IMAGE_ID) | (ids == SEP)).int().cumsum(1)
        types = ((first > 1) & mask.bool()).long()
        hidden = self.language_model.bert(
            inputs_embeds=embeddings, attention_mask=mask, token_type_ids=types
        ).last_hidden_state
        return hidden  # type: ignore[no-any-return]

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """Matching logits [B] from the CLS place."""
        pooled = torch.tanh(self.pooler(hidden[:, 0]))
        return self.classifier(pooled).squeeze(-1)  # type: ignore[no-any-return]


@dataclass
class Bank:
    """Rendered scenes in groups of GROUP (the base first) with captions and dense labels."""

    pixels: Uint8  # [N, 72, 72, 3]
    labels_tower: npt.NDArray[np.int8]  # [N, 81, 6]
    labels_tokens: npt.NDArray[np.int8]  # [N, 64, 6]
    captions: list[str]


def _dense_labels(scene: scenes.Scene, grid: int) -> npt.NDArray[np.int8]:
    cells = scenes.cell_labels(scene, grid).astype(int)
    table = np.array(
        [[0, -100, -100]]
        + [
            [
                1 + list(scenes.COLORS).index(thing.color),
                scenes.SHAPES.index(thing.shape),
                scenes.SIZES.index(thing.size),
            ]
            for thing in scene.things
        ]
    )
    rows, columns = np.mgrid[:grid, :grid]
    ground = np.full_like(cells, list(scenes.BACKGROUNDS).index(scene.background))
    labels = np.concatenate([table[cells], np.stack([ground, rows, columns], -1)], -1)
    return labels.reshape(grid * grid, 6).astype(np.int8)


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

    def first_stage(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """[CLS] text [SEP], padded to the first stage's fixed length."""
        out = np.zeros((len(rows), tiny_model.MAX_FIRST_STAGE_TEXT), np.int64)
        for i, row in enumerate(rows):
            ids = [CLS, *self.ids[row], SEP]
            out[i, : len(ids)] = ids
        return torch.from_numpy(out)

    def joint(self, rows: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """[CLS] text [SEP] <image>*64 [SEP], right-padded, and its attention mask."""
        length = NUM_TOKENS + 3 + int(self.lengths[rows].max())
        out = np.zeros((len(rows), length), np.int64)
        for i, row in enumerate(rows):
            ids = [CLS, *self.ids[row], SEP, *[IMAGE_ID] * NUM_TOKENS, SEP]
            out[i, : len(ids)] = ids
        ids = torch.from_numpy(out)
        return ids, (torch.arange(length) < (ids != 0).sum(1, keepdim=True)).long()


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

    def train(self, losses: Any, evaluate: Any, *, every: int, evaluate_every: int) -> None:
        """`losses(rng)` gives named losses; a step's rng follows from its number alone."""
        sums: dict[str, float] = {}
        while self.step < self.total:
            started = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * schedule(self.step, self.total)
            parts = losses(np.random.default_rng([7, self.step]))
            self.optimizer.zero_grad(set_to_none=True)
            torch.stack(list(parts.values())).sum().backward()
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


class Tower(nn.Module):
    """First stage (vision and text towers) and adapter, with the dense heads of training."""

    def __init__(self) -> None:
        super().__init__()
        self.siglip = SiglipModel(tiny_model.siglip_config())
        nn.init.constant_(self.siglip.logit_scale, np.log(10.0))
        nn.init.constant_(self.siglip.logit_bias, -10.0)
        self.adapter = Adapter()
        self.head_tower, self.head_tokens = DenseHead(), DenseHead()

    def images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, 81, H] and unit embeddings [B, H]."""
        out = self.siglip.vision_model(pixel_values=pixels)
        return out.last_hidden_state, F.normalize(out.pooler_output, dim=-1)

    def texts(self, ids: torch.Tensor) -> torch.Tensor:
        """Unit embeddings [B, H]."""
        return F.normalize(self.siglip.text_model(input_ids=ids).pooler_output, dim=-1)

    @torch.no_grad()
    def tokens(self, pixels: Uint8, batch: int = 200) -> npt.NDArray[np.float16]:
        """float16 [N, 64, H], as a store holds them."""
        parts = [
            self.adapter(self.images(normalized(pixels[i : i + batch]))[0]).half().numpy()
            for i in range(0, len(pixels), batch)
        ]
        return np.concatenate(parts)


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


def _false_words(captions: Captions, right: int, other: int) -> npt.NDArray[np.float32] | None:
    """For the caption `right` shown with the image of `other`: 1 for each word false of it."""
    a, b = captions.ids[right], captions.ids[other]
    if len(a) != len(b):
        return None
    return np.not_equal(a, b).astype(np.float32)


class MatchingBatches:
    """Draws queries of one length class and, for each, its image, neighbours and a stranger."""

    def __init__(self, bank: Bank, captions: Captions, num_queries: int = 24):
        self.captions, self.num_queries = captions, num_queries
        base = captions.lengths[::GROUP]
        self.classes = [np.flatnonzero(base < 15), np.flatnonzero(base >= 15)]

    def draw(self, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], ...]:
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

    def word_labels(
        self, texts: npt.NDArray[np.int64], images: npt.NDArray[np.int64], length: int
    ) -> torch.Tensor:
        """float [n*5, length]: 1 false, 0 true, -1 not asked (strangers, other templates)."""
        labels = np.full((len(texts), length), -1, np.float32)
        for i, (text, image) in enumerate(zip(texts, images, strict=True)):
            words = _false_words(self.captions, text, image) if text // GROUP == image // GROUP else None
            if words is not None:
                labels[i, 1 : 1 + len(words)] = words
        return torch.from_numpy(labels)


def _masked(ids: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the caption's words masked, and the labels (-100 elsewhere)."""
    words = (ids > MASK) & (ids != IMAGE_ID)
    hide = words & torch.from_numpy(rng.random(tuple(ids.shape)) < 0.5)
    return ids.masked_fill(hide, MASK), ids.masked_fill(~hide, -100)


def joint_losses(
    joint: Joint, batches: MatchingBatches, tokens: npt.NDArray[np.float16], rng: np.random.Generator
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
    order: npt.NDArray[np.int64],
    queries: npt.NDArray[np.int64],
    num_candidates: int,
) -> npt.NDArray[np.int64]:
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
        queries = np.arange(0, len(order), 4)
        ranks = rerank_ranks(joint, validation_captions, validation_tokens, order, queries, 20)
        return "validation, 20 candidates: " + recall(ranks)

    run.train(
        lambda rng: joint_losses(joint, batches, tokens, rng),
        evaluate,
        every=25,
        evaluate_every=250,
    )
    return joint.eval()


def main() -> None:
    """Run both stages and write what `edje.demo.pack` packs."""
    parser = argparse.ArgumentParser(description="Train the demo's tiny EDJE model.")
    parser.add_argument("--work", type=Path, default=Path(".train"))
    parser.add_argument("--groups", type=int, default=6000)
    parser.add_argument("--tower-steps", type=int, default=1000)
    parser.add_argument("--joint-steps", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    settings = {key: str(value) for key, value in vars(options).items()}
    (options.work / "settings.json").write_text(json.dumps(settings, indent=2))
    bank = make_bank(TRAIN_SEED, options.groups, num_extra=NUM_EXTRA, supersample=1)
    validation = make_bank(VALIDATION_SEED, 64, num_extra=0, supersample=2)
    tower = train_tower(options.work, bank, validation, options.tower_steps)
    train_joint(options.work, bank, validation, tower, options.joint_steps)


if __name__ == "__main__":
    main()
