"""Train the tiny EDJE model on scenes: `python -m edje.demo.training`; with `--pack`, keep it.

Three stages, each resumable (the same command continues where it was stopped):

1. *Tower.* The vision tower, the adapter and the first-stage text tower learn together: what
   lies under every square (the renderer knows: colour, shape, size, place) read from the
   tower's features and from the adapter's 64 tokens, plus SigLIP's sigmoid loss between
   images and captions. Then all three are frozen and every scene's tokens are computed once.
2. *Joint encoder.* On those tokens, in float16 as a store holds them: softmax matching of a
   caption over {its image, hard neighbours, a random image}, masked captions (50 %), and for
   each word of a neighbour's pair whether it is false of that image.
3. *Places.* The same, and half-way up the encoder each word of a thing must say in which of the
   nine cells that thing stands. Without it colours, shapes and sizes were bound to their things,
   but which of two stands left or above stayed a guess.

Losses beyond EDJE's own (dense labels, false words, places) have heads that are thrown away.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..scenes import SEEDS
from .data import NUM_EXTRA, make_bank
from .pack import pack
from .train import train_joint, train_tower


def main() -> None:
    """Run the three stages, or pack what they wrote into `demo/model`."""
    parser = argparse.ArgumentParser(description="Train the demo's tiny EDJE model.")
    parser.add_argument("--work", type=Path, default=Path(".train"))
    parser.add_argument("--groups", type=int, default=4000)
    parser.add_argument("--tower-steps", type=int, default=900)
    parser.add_argument("--joint-steps", type=int, default=4200)
    parser.add_argument("--places-steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pack", action="store_true", help="pack a finished run")
    options = parser.parse_args()
    if options.pack:
        pack(options.work)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    settings = {key: str(value) for key, value in vars(options).items()}
    (options.work / "settings.json").write_text(json.dumps(settings, indent=2))
    bank = make_bank(SEEDS["train"], options.groups, num_extra=NUM_EXTRA, supersample=1)
    validation = make_bank(SEEDS["validation"], 48, num_extra=0, supersample=2)
    tower = train_tower(options.work, bank, validation, options.tower_steps)
    steps = {"joint": options.joint_steps, "places": options.places_steps}
    train_joint(options.work, bank, validation, tower, steps)


if __name__ == "__main__":
    main()
