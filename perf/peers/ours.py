"""Our own ways: `Reranker.rank` over the store, with what `auto` chooses and with every engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ...bundle import BundleManifest
from ...engines.builder.build import build_engine
from ...engines.builder.cache import cached_engine
from ...engines.builder.options import EngineOptions
from ...engines.fidelity import FidelityLimits
from ...engines.manifest import EngineManifest
from ...engines.registry import load_backend, open_engine
from ...engines.samples import RandomSamples
from ...errors import EdjeError, EngineError
from ...machine import cpu_features
from ...runtime.queries import StoreSamples
from ...runtime.reranker import Reranker
from ...runtime.text import QueryTokenizer
from ..harness import scores_in_order
from ..subjects import query_of_length
from .contest import Ask, Bench, SkippedError

AUTO = "auto"
# Scores of random weights lie closer together than a trained model's, which int8 ranks at 0.98.
LIMITS = FidelityLimits(min_kendall_tau=0.85)
NUM_QUERIES, NUM_CANDIDATES = 4, 24  # that `auto` calibrates and measures engines with


def engine_of(bench: Bench, backend: str, precision: str) -> Path:
    """Return the folder of an engine of the bench's model.

    Raises:
        SkippedError: this machine cannot run it.
    """
    try:
        reason = load_backend(backend).why_not(precision)
    except EngineError as error:
        raise SkippedError(f"{error.message}: {error.hint}") from error
    if reason is not None:
        raise SkippedError(reason)
    return cached_engine(
        bench.bundle,
        bench.engines,
        backend=backend,
        precision=precision,
        calibration=RandomSamples(BundleManifest.read(bench.bundle)),
        progress=bench.progress,
    )


def auto_engine(bench: Bench) -> Path:
    """Return what `edje build --backend auto` chooses for this machine, kept between runs."""
    key = hashlib.sha256(json.dumps([bench.device, *cpu_features()]).encode()).hexdigest()[:12]
    folder = bench.engines / f"{AUTO}-{key}"
    try:
        open_engine(folder).close()
        return folder
    except EdjeError:  # not there, or stale
        pass
    queries = bench.scratch / "calibration.txt"
    tokenizer = QueryTokenizer.open(bench.bundle, BundleManifest.read(bench.bundle).text)
    longest = BundleManifest.read(bench.bundle).text.max_wordpieces
    lengths = [1 + (longest - 1) * at // (NUM_QUERIES - 1) for at in range(NUM_QUERIES)]
    lines = [query_of_length(tokenizer, length) for length in lengths]
    queries.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with StoreSamples.open(
        bench.store, bench.bundle, queries, num_candidates=NUM_CANDIDATES
    ) as calibration:
        build_engine(
            bench.bundle,
            folder,
            backend=AUTO,
            calibration=calibration,
            options=EngineOptions(limits=LIMITS),
            overwrite=folder.exists(),
            progress=bench.progress,
        )
    return folder


def ranked(backend: str, precision: str = "") -> Callable[[Bench], Ask]:
    """Return what opens a reranker with one engine: of `auto`, or of a backend and precision."""

    def make(bench: Bench) -> Ask:
        folder = auto_engine(bench) if backend == AUTO else engine_of(bench, backend, precision)
        reranker = bench.stack.enter_context(Reranker.open(folder, store=bench.store))
        return lambda question, num_pairs: partial(
            scores_in_order, reranker, question.text, bench.ids[:num_pairs]
        )

    return make


def words_of_auto(bench: Bench) -> str:
    """Return what `auto` chose, in words."""
    return EngineManifest.read(auto_engine(bench)).words
