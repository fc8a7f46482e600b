"""Our own ways: `Reranker.rank` over the store, with what `auto` chooses and with every engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ...bundle import BundleManifest
from ...engines.builder.cache import cached_engine
from ...engines.manifest import MANIFEST, EngineManifest
from ...engines.registry import load_backend
from ...engines.samples import RandomSamples
from ...errors import EngineError
from ...runtime.reranker import Reranker
from ..harness import scores_in_order
from ..subjects import AUTO, build_all
from .contest import Ask, Bench, SkippedError


def engine_of(bench: Bench, backend: str, precision: str) -> Path:
    """Return the folder of an engine of the bench's model: what `auto` tried, or built here.

    Raises:
        SkippedError: this machine cannot run it.
    """
    try:
        reason = load_backend(backend).why_not(precision)
    except EngineError as error:
        raise SkippedError(f"{error.message}: {error.hint}") from error
    if reason is not None:
        raise SkippedError(reason)
    tried = kept_engines(bench) / f"{backend}-{precision}"
    if (tried / MANIFEST).exists():
        return tried
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
    return kept_engines(bench) / AUTO


def kept_engines(bench: Bench) -> Path:
    """Return the folder with the engine `auto` and all that it tried, `<backend>-<precision>`."""
    found: Path = bench.once(
        AUTO, lambda: build_all(bench.bundle, bench.engines, bench.progress, bench.device)
    )
    return found


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
