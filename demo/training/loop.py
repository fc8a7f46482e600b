"""A resumable training loop: optimiser, schedule, checkpoints and a line of log."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

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
