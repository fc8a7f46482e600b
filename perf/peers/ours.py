"""Our own ways: `Reranker.rank` over the store, with what `auto` chooses and with every engine."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ...bundle import BundleManifest
from ...engines.builder.auto import build_fastest
from ...engines.builder.cache import cached_engine
from ...engines.builder.options import EngineOptions, EngineRequest
from ...engines.fidelity import FidelityLimits
from ...engines.manifest import MANIFEST, EngineManifest
from ...engines.registry import load_backend, open_engine
from ...engines.samples import RandomSamples
from ...errors import EdjeError, EngineError
from ...machine import cpu_features
from ...runtime.queries import StoreSamples
from ...runtime.reranker import Reranker
from ...runtime.text import QueryTokenizer
from ..harness import Progress, scores_in_order
from ..random_model import CACHE, random_tokens, source_hash, write_store
from ..subjects import query_of_length
from .contest import Ask, Bench, SkippedError

AUTO = "auto"
# Scores of random weights lie closer together than a trained model's, which int8 ranks at 0.98.
LIMITS = FidelityLimits(min_kendall_tau=0.85)
# That `auto` calibrates and measures engines with.
NUM_QUERIES, NUM_CANDIDATES, NUM_IMAGES = 4, 24, 256


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


def engines_folder(bundle: Path) -> Path:
    """Return the folder that keeps a bundle's engines, for this state of the sources."""
    scorer = BundleManifest.read(bundle).fingerprint_scorer
    return CACHE / f"engines-{source_hash('engines')}-{scorer[:8]}"


def build_all(bundle: Path, root: Path, progress: Progress, device: str = "cpu") -> Path:
    """Let `auto` choose an engine once for every kind of machine; keep it, and all it tried.

    Returns:
        The folder of `auto` and of `<backend>-<precision>`, each an engine folder.
    """
    key = hashlib.sha256(json.dumps([device, *cpu_features()]).encode()).hexdigest()[:12]
    folder = root / f"{AUTO}-{key}"
    try:
        open_engine(folder / AUTO).close()
        return folder
    except EdjeError:  # not there, or stale
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    manifest = BundleManifest.read(bundle)
    tokenizer, longest = QueryTokenizer.open(bundle, manifest.text), manifest.text.max_wordpieces
    lengths = [1 + (longest - 1) * at // (NUM_QUERIES - 1) for at in range(NUM_QUERIES)]
    with TemporaryDirectory(dir=root) as scratch:
        store, queries = Path(scratch) / "tokens.store", Path(scratch) / "calibration.txt"
        tokens, encoder = random_tokens(NUM_IMAGES, manifest.sizes), manifest.fingerprint_encoder
        write_store(store, tokens, encoder=encoder).close()
        lines = [query_of_length(tokenizer, length) for length in lengths]
        queries.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with StoreSamples.open(store, bundle, queries, num_candidates=NUM_CANDIDATES) as samples:
            options = EngineOptions(limits=LIMITS)
            asked = EngineRequest(bundle, AUTO, AUTO, samples, options)
            build_fastest(asked, folder / AUTO, progress=progress, trials=folder)
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
