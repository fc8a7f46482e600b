"""A backend whose engine fails on command, for faults that no real engine shows when asked.

A file `mood` in the engine's folder says what it does, read before every batch:

- `fine`: a pair's score is the image's value plus what the query adds (`text_score`).
- `raise`: every batch fails; `raise once`: the next one; `raise at 7`: those with the value 7.
- `nan at 7`: pairs with the value 7 score NaN; `wrong`: every score is 1 too high.
- `sleep 0.1`: a batch takes so many seconds; `hang`: until the mood is another.
- `unopenable`: read when the engine is opened.

Run as a script it is `edje` with this backend: `python moody_backend.py serve FOLDER ...`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from edje.engines.contract import Batch, OpenOptions
from edje.engines.manifest import EngineManifest
from edje.engines.registry import REGISTRY, BackendEntry
from edje.errors import EngineError
from toy_engine import ToyEngine, toy_manifest, toy_tokenizer_json

NAME = "moody"
COMMAND = (sys.executable, __file__)
ENTRY = BackendEntry("moody_backend", "numpy", "cpu", ("fp32",))
PIECE = {"a": 9, "red": 5, "blue": 6, "circle": 7, "square": 8}  # ids of some words


def version() -> str:
    return "1"


def why_not(precision: str) -> None:
    return None


def device_faults(manifest: EngineManifest) -> list[str]:
    return []


def load(folder: Path, manifest: EngineManifest, options: OpenOptions) -> MoodyEngine:
    if mood_of(folder) == "unopenable":
        raise EngineError("the engine cannot be opened")
    return MoodyEngine(folder, manifest)


class MoodyEngine(ToyEngine):
    """Scores as `ToyEngine` does, in the mood that its folder says."""

    def __init__(self, folder: Path, manifest: EngineManifest):
        super().__init__(manifest)
        self._folder = folder

    def _infer(self, batch: Batch, scores: np.ndarray) -> None:
        mood, _, what = mood_of(self._folder).partition(" ")
        while mood == "hang" and mood_of(self._folder) == "hang":
            time.sleep(0.01)
        if mood == "sleep":
            time.sleep(float(what))
        values = batch.visual_tokens[:, 0, 0]
        at = values == float(what[3:]) if what.startswith("at ") else np.ones(len(values), bool)
        if mood == "raise" and at.any():
            if what == "once":
                set_mood(self._folder, "fine")
            raise RuntimeError("the engine is in a bad mood")
        super()._infer(batch, scores)
        if mood == "nan":
            scores[at] = np.nan
        if mood == "wrong":
            scores += 1


def write_engine(folder: Path, *, max_pairs: int = 8, mood: str = "fine") -> Path:
    """Write an engine folder that `edje` opens once the backend is registered."""
    folder.mkdir()
    replace(toy_manifest(max_pairs=max_pairs), backend=NAME).write(folder)
    (folder / "tokenizer.json").write_text(toy_tokenizer_json(), encoding="utf-8")
    set_mood(folder, mood)
    return folder


def set_mood(folder: Path, mood: str) -> None:
    """Set it whole: an engine may be reading it."""
    fresh = folder / "mood.new"
    fresh.write_text(mood)
    fresh.rename(folder / "mood")


def mood_of(folder: Path) -> str:
    return (folder / "mood").read_text()


def text_score(query: str) -> float:
    """What a query of words of `PIECE` adds to each of its scores."""
    return (2 + 3 + sum(PIECE[word] for word in query.split())) / 1024


if __name__ == "__main__":
    REGISTRY[NAME] = ENTRY  # type: ignore[index]
    from edje.runtime.cli import main

    sys.argv[0] = "edje"
    sys.exit(main())
