"""One batch of `rank` goes through few files and few calls: the way that a reader follows."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import edje
from edje.runtime.pipeline import NUM_SLOTS
from edje.runtime.reranker import Reranker
from edje.runtime.store import TokenStore
from toy_engine import FINGERPRINT, HIDDEN, NUM_TOKENS, ToyEngine, toy_tokenizer

ROOT = Path(edje.__file__).parent
STORE = "runtime/store/"
HOPS = ["reranker", "batcher", "pipeline", "streams", "results"]
# Of this thread, the store's own reads left out: they have limits of their own.
MOST_FILES, MOST_CALLS, MOST_DEPTH = 11, 95, 9
IDS = [f"img-{number}" for number in range(6)]


@pytest.fixture
def reranker(tmp_path: Path) -> Iterator[Reranker]:
    sizes = {"num_tokens": NUM_TOKENS, "hidden": HIDDEN, "fingerprint_encoder": FINGERPRINT}
    with TokenStore.create(tmp_path / "store", **sizes) as store:
        store.append(IDS, np.ones((len(IDS), NUM_TOKENS, HIDDEN), np.float16))
    with (
        TokenStore.open(tmp_path / "store") as store,
        Reranker(ToyEngine(), toy_tokenizer(tmp_path), store) as opened,
    ):
        yield opened


class Way:
    """The package's calls of one thread, in their order, and how deep they went."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.depth = self.most_depth = 0

    def follow(self, call: Callable[[], Any]) -> None:
        sys.setprofile(self._step)
        try:
            call()
        finally:
            sys.setprofile(None)

    def _step(self, frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not path.is_relative_to(ROOT):
            return
        file = path.relative_to(ROOT).as_posix()
        if file.startswith((STORE, "tests/", ".venv/")):
            return
        self.depth += 1 if event == "call" else -1
        self.most_depth = max(self.most_depth, self.depth)
        if event == "call":
            self.files.append(file)


def test_a_batch_goes_through_five_hops_few_files_and_few_calls(reranker: Reranker) -> None:
    for _ in range(NUM_SLOTS):  # each slot meets the batch's sizes
        reranker.rank("red circle", IDS, 3)
    way = Way()
    way.follow(lambda: reranker.rank("red circle", IDS, 3))
    calls = Counter(way.files)
    hops = [f"runtime/{name}.py" for name in HOPS]
    assert set(hops) <= calls.keys()
    assert len(calls) <= MOST_FILES, calls
    assert calls.total() <= MOST_CALLS, calls
    assert way.most_depth <= MOST_DEPTH
