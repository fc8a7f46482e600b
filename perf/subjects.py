"""What stages are measured on: an engine folder, a store and a query, made where none is given."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ..arrays import Array, Int64
from ..bundle import BundleManifest
from ..engines.builder.options import EngineOptions, EngineRequest
from ..engines.fidelity import FidelityLimits
from ..engines.manifest import EngineManifest, Profile
from ..engines.registry import open_engine
from ..errors import EdjeError
from ..machine import cpu_features
from ..runtime.queries import StoreSamples
from ..runtime.text import QueryTokenizer
from ..tokens import quantize_tokens
from .free_engine import write_free_engine
from .harness import Progress
from .random_model import (
    CACHE,
    full_size_bundle,
    full_size_engine,
    random_tokens,
    source_hash,
    write_store,
)
from .wide_store import write_wide_store

MAX_KNOWN = 2048  # records of a random store that are not holes: 100 MB
FREE_PROFILE = Profile(256, (16, 32, 64))
AUTO = "auto"


# Scores of random weights lie closer together than a trained model's, which int8 ranks at 0.98.
LIMITS = FidelityLimits(min_kendall_tau=0.85)
# That `auto` calibrates and measures engines with.
NUM_QUERIES, NUM_CANDIDATES, NUM_IMAGES = 4, 24, 256


def engines_folder(bundle: Path) -> Path:
    """Return the folder that keeps a bundle's engines, for this state of the sources."""
    scorer = BundleManifest.read(bundle).fingerprint_scorer
    return CACHE / f"engines-{source_hash('engines')}-{scorer[:8]}"


def build_all(bundle: Path, root: Path, progress: Progress, device: str = "cpu") -> Path:
    """Let `auto` choose an engine once for every kind of machine; keep it, and all it tried.

    Returns:
        The folder of `auto` and of `<backend>-<precision>`, each an engine folder.
    """
    from ..engines.builder.auto import build_fastest

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


def query_of_length(tokenizer: QueryTokenizer, wordpieces: int) -> str:
    """Return a text of so many wordpieces.

    Raises:
        EdjeError: the tokenizer splits the words that were tried otherwise, or cuts the text.
    """
    for word in ("word{}", "a"):
        text = " ".join(word.format(at) for at in range(wordpieces))
        found = tokenizer([text])
        if found.text_length[0] == wordpieces + 2 and not found.truncated[0]:
            return text
    raise EdjeError(
        f"no text of {wordpieces} wordpieces was found for this tokenizer",
        hint="give a query of your own with --query",
    )


def drawn(count: int, of: int) -> Int64:
    """Draw numbers without repetition, the same every time: int64 [count]."""
    if not 1 <= count <= of:
        raise EdjeError(f"{count:,} candidates of {of:,} images, expected 1 to {of:,}")
    return np.random.default_rng(0).choice(of, count, replace=False)


def engine_folder(
    scratch: Path,
    progress: Progress,
    *,
    free: bool = False,
    backend: str = "openvino",
    precision: str | None = None,
) -> Path:
    """Return the full-size random scorer's engine, built once for every state of the sources.

    Args:
        free: one of its sizes that takes no time, written into `scratch`.
        precision: None: the fastest that this CPU has.

    Raises:
        EngineError: `backend` does not run `precision` here.
    """
    progress("making the full-size scorer (kept in .cache/)")
    bundle = full_size_bundle()
    if free:
        return write_free_engine(bundle, scratch / "engine", FREE_PROFILE)
    return full_size_engine(bundle, backend, precision, progress)


def random_store(
    folder: Path, scratch: Path, candidates: int, images: int | None, progress: Progress
) -> Int64:
    """Write `scratch/tokens.store`; return the numbers of the images to ask for: int64 [N].

    Its tokens are random; those beyond `MAX_KNOWN` images are zeros, which take no space.
    """
    manifest, count = EngineManifest.read(folder), images or max(candidates, MAX_KNOWN)
    asked = drawn(candidates, count)
    progress(f"writing a store of {count:,} images")
    tokens: Array = random_tokens(min(count, MAX_KNOWN), manifest.bundle.sizes)
    scales = None
    if manifest.token_dtype == "int8":
        tokens, scales = quantize_tokens(tokens)
    encoder = manifest.bundle.fingerprint_encoder
    path = scratch / "tokens.store"
    write_wide_store(path, count, tokens, scales, asked=asked.tolist(), encoder=encoder)
    return asked
