"""Stage 1: vision tower, adapter and first-stage text tower, together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from .bank import Bank, Captions, normalized
from .loop import Run
from .models import Tower


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
