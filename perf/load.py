"""Latency against load: more and more clients, each waiting for its answer before it asks again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..engines.manifest import EngineManifest
from ..errors import EdjeError
from ..runtime.results import Hit
from ..runtime.text import QueryTokenizer
from ..show import progress_bar
from .measure import scratch_folder
from .random_model import full_size_bundle, full_size_engine
from .report import Measured, benchmark_json
from .serve_traffic import Known, asking
from .server_process import ServerProcess, serving
from .subjects import query_of_length, random_store

GROUP = "load"
CLIENTS = (1, 2, 4, 8, 16)
NUM_IMAGES, WORDPIECES, TOP_K = 1000, 13, 10
LEAST_REQUESTS = 3  # of every client
MAX_WAIT = ("--max-wait", "600")  # nobody is refused: who waits shall be seen waiting
TOLERANCE = 5e-3


def measure_load(
    engine: Path | None = None,
    *,
    store: Path | None = None,
    clients: Sequence[int] = CLIENTS,
    candidates: int = 100,
    seconds: float = 5.0,
) -> dict[str, Any]:
    """Serve an engine in a process of its own; return what a request took, by number of clients.

    Args:
        engine: folder; None: the full-size random scorer.
        store: of the engine; None: random tokens.
        candidates: of each request, drawn anew for every client.
        seconds: that each number of clients asks for.

    Raises:
        EdjeError: the server does not come up, refuses somebody, or ranks wrongly.
    """
    folder = engine or full_size_engine(full_size_bundle(), "openvino", None)
    manifest = EngineManifest.read(folder)
    text = query_of_length(QueryTokenizer.open(folder, manifest.bundle.text), WORDPIECES)
    measured = []
    with scratch_folder() as scratch, ExitStack() as stack, progress_bar("load") as update:
        if store is None:
            random_store(folder, scratch, NUM_IMAGES, NUM_IMAGES, lambda line: None)
            store = scratch / "tokens.store"
        known = Known.of(folder, store, [text])
        if candidates > len(known.ids):
            raise EdjeError(f"{candidates} candidates of {len(known.ids)} images")
        server = stack.enter_context(serving(folder, store, *MAX_WAIT, scratch=scratch))
        for at, number in enumerate(clients):
            one = _Load(server, known, text, candidates)
            took, elapsed = one.press(number, seconds)
            measured.append(
                Measured(
                    "serve",
                    GROUP,
                    took,
                    pairs=candidates,
                    params={"clients": number},
                    elapsed_s=elapsed,
                )
            )
            update(at + 1, len(clients))
    where = {"engine": manifest.words, "candidates": candidates, "images": len(known.ids)}
    return benchmark_json(measured, conditions={**where, "wordpieces": WORDPIECES})


class _Load:
    """Clients on one server."""

    def __init__(self, server: ServerProcess, known: Known, text: str, candidates: int):
        self._server, self._known = server, known
        self._text, self._candidates = text, candidates
        self._took: list[float] = []
        self._faults: list[str] = []

    def press(self, clients: int, seconds: float) -> tuple[list[float], float]:
        """Let so many clients ask; return seconds of every request, and of all together.

        Raises:
            EdjeError: a request failed, or was answered wrongly.
        """
        began = perf_counter()
        until = began + seconds
        threads = [
            threading.Thread(target=self._be_client, args=(number, until), daemon=True)
            for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = perf_counter() - began
        if self._faults:
            raise EdjeError("requests failed; nothing is reported", faults=self._faults[:5])
        return self._took, elapsed

    def _be_client(self, number: int, until: float) -> None:
        draw = np.random.default_rng(number)
        picked = draw.choice(len(self._known.ids), self._candidates, replace=False)
        ids = [self._known.ids[at] for at in picked.tolist()]
        with ExitStack() as stack:
            ask = asking(stack, self._server, self._text, ids, TOP_K)
            done = 0
            try:
                while perf_counter() < until or done < LEAST_REQUESTS:
                    began = perf_counter()
                    hits = ask()
                    self._took.append(perf_counter() - began)
                    self._check(picked, hits)
                    done += 1
            except (EdjeError, OSError) as error:
                self._faults.append(str(error))

    def _check(self, picked: Any, hits: Sequence[Hit]) -> None:
        scores = self._known.scores[self._text][picked]
        best = np.sort(scores)[::-1][:TOP_K]
        found = np.array([hit.score for hit in hits])
        own = scores[[hit.index for hit in hits]]
        if not all(np.allclose(found, right, atol=TOLERANCE) for right in (best, own)):
            raise EdjeError("the server ranked otherwise than Reranker.rank")
