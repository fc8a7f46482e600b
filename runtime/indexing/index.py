"""`edje index`: images or features -> encoder -> token store. Run again, it continues."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...arguments import Arguments, Progress
from ...bundle import BundleManifest
from ...engines.image import FeatureEncoder, ImageEncoder
from ...errors import RequestError, StoreError, named
from ...files import is_free
from ..store import TokenStore
from .cluster import adopt_leftovers
from .decoders import DecoderPool, default_workers
from .features import FeatureSource
from .flow import (
    DEFAULT_BATCH_SIZE,
    OnSkip,
    Run,
    SkippedLog,
    decoded_batches,
    feature_batches,
    groups,
    index_batches,
)
from .images import import_pillow
from .sources import Paths, SkippedImage, Source, open_source

DEFAULT_DTYPE = "float16"


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What a run did.

    Attributes:
        indexed: records added by this call.
        already_present: ids that the store held before; they are not read again.
        num_skipped: entries without a record; `STORE/skipped.jsonl` holds them all.
        skipped: the first 1,000 of them.
        num_ignored: members of tars that are no images (captions, labels).
        num_links: links to folders that were not followed; with `follow_links` those that lead
            back to a folder above.
        seconds: of this call.
        images_per_s: indexed / seconds.
        encoder: the library that ran the encoder, with its version, and the device.
    """

    indexed: int
    already_present: int
    num_skipped: int
    skipped: tuple[SkippedImage, ...]
    num_ignored: int
    num_links: int
    seconds: float
    images_per_s: float
    encoder: str


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """What runs of every kind have in common; see `index_images`."""

    dtype: str | None
    only: Iterable[str] | None
    progress: Progress | None
    on_skip: OnSkip | None
    follow_links: bool = False

    def taken(self, given: Arguments) -> IndexOptions:
        """Return them with `only` taken once; what is of another kind is noted in `given`."""
        if self.dtype is not None:
            given.text("dtype", self.dtype, "the name of a dtype, or None")
        given.callback("progress", self.progress)
        given.callback("on_skip", self.on_skip)
        given.flag("follow_links", self.follow_links)
        only = self.only
        return replace(self, only=None if only is None else frozenset(given.strings("only", only)))


def index_images(
    encoder: ImageEncoder,
    images: Paths,
    store: str | os.PathLike[str],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    workers: int | None = None,
    dtype: str | None = None,
    only: Iterable[str] | None = None,
    progress: Progress | None = None,
    on_skip: OnSkip | None = None,
    follow_links: bool = False,
) -> IndexReport:
    """Encode images and append their tokens to a store, which is made if there is none.

    Ids that the store holds already are left out, so the same call continues after an
    interruption. Records stand in the source's order. What gives no record is written to
    `STORE/skipped.jsonl` and tried again next time. A thread reads, processes decode, the
    caller's thread encodes and a thread appends; at most `workers` + 7 batches are between
    source and disk, so memory does not grow with the number of images, but for the ids: some
    60 bytes each in the store's index, and 8 of a tar's.

    Args:
        encoder: makes the tokens.
        images: a folder (an id is the path below it, with `/`), a list file (`id<TAB>path` a
            line), or WebDataset tars (an id is the member's name): see `open_source`.
        store: folder of the store.
        batch_size: images a forward.
        workers: decoder processes; default: the usable cores but one.
        dtype: `float16` or `int8`, of a new store (default: float16); one that exists must agree.
        only: index just these ids.
        progress: called with (done, total) after every batch; of a tar, the total is estimated.
        on_skip: called with every entry that gives no record.
        follow_links: go into links to folders too; where one leads back up, the walk ends.

    Returns:
        The report; what is no readable image, or has no finite tokens, is in `skipped`.

    Raises:
        RequestError: nothing to index, a faulty list file (all lines named), ids of `only` that
            the source lacks, no Pillow; arguments of another kind, all of them, before any work.
        StoreError: a store of another encoder or dtype, or one that cannot be written.
    """
    given = Arguments("index_images")
    options = IndexOptions(dtype, only, progress, on_skip, follow_links).taken(given)
    batch_size, folder = _common(given, encoder, ImageEncoder, batch_size, store)
    paths = _paths(given, images)
    if workers is not None:
        workers = given.whole("workers", workers, "at least 1, or None")
    given.check()
    import_pillow()
    source = open_source(paths, leave_out=folder, follow_links=follow_links)
    with DecoderPool(encoder.image, workers or default_workers()) as pool:

        def work(run: Run) -> str:
            files = groups(source.entries(run.wants), batch_size)
            index_batches(run, encoder.encode_rgb, decoded_batches(pool, files))
            return encoder.name

        return run_index(encoder.manifest, source, folder, options, work)


def index_features(
    encoder: FeatureEncoder,
    features: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    ids: str | os.PathLike[str] | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    dtype: str | None = None,
    only: Iterable[str] | None = None,
    progress: Progress | None = None,
    on_skip: OnSkip | None = None,
    follow_links: bool = False,
) -> IndexReport:
    """Run the adapter over patch features and append the tokens; else as `index_images`.

    Args:
        encoder: the adapter.
        features: a `.npy`, a `.safetensors` or a folder of such files: see `FeatureSource`.
        ids: list of the ids of a `.npy`, one a line; default: `ids.txt` beside it.

    Raises:
        RequestError: a file that holds no features, ids that do not fit it; else as `index_images`.
        StoreError: as `index_images`.
    """
    given = Arguments("index_features")
    options = IndexOptions(dtype, only, progress, on_skip, follow_links).taken(given)
    batch_size, folder = _common(given, encoder, FeatureEncoder, batch_size, store)
    path = given.path("features", features)
    listed = None if ids is None else given.path("ids", ids, "the path of a list, or None")
    given.check()
    source = FeatureSource(path, encoder.manifest.sizes, ids=listed, follow_links=follow_links)

    def work(run: Run) -> str:
        entries = groups(source.entries(run.wants), batch_size)
        index_batches(run, encoder.encode, feature_batches(entries))
        return encoder.name

    return run_index(encoder.manifest, source, folder, options, work)


def _common(
    given: Arguments, encoder: object, kind: type, batch_size: object, store: object
) -> tuple[int, Path]:
    """Return the batch size and the store's folder; what is of another kind is noted."""
    if not isinstance(encoder, kind):
        given.refuse("encoder", encoder, f"an open {kind.__name__}")
    size = given.whole("batch_size", batch_size, "at least 1")
    return size, given.path("store", store, "the folder of a token store")


def _paths(given: Arguments, images: Paths) -> list[Any]:
    """Return one path, or several, as they were given; what is none is noted."""
    expected = "a path, or several"
    lone = isinstance(images, str | os.PathLike)
    paths = [images] if lone else given.items("images", images, expected)
    for path in paths:
        given.path("images", path, expected)
    return paths


def run_index(
    manifest: BundleManifest,
    source: Source[Any],
    folder: Path,
    options: IndexOptions,
    work: Callable[[Run], str],
) -> IndexReport:
    """Index a source: `work` takes what its run selects to the store, and names the encoder.

    Raises:
        RequestError: nothing to index, or ids of `options.only` that the source lacks.
        StoreError: a store of another encoder or dtype, or one that cannot be written.
    """
    started = time.perf_counter()
    only = None if options.only is None else frozenset(options.only)
    _check_only(source, only)
    with ExitStack() as stack:
        store = stack.enter_context(_open_store(folder, manifest, options.dtype))
        adopt_leftovers(store)
        log = stack.enter_context(SkippedLog(folder))
        run = Run(store, source, log, only, options.progress, options.on_skip)
        encoder = work(run)
        run.finish()
    if run.num_done == 0:
        raise RequestError(f"{' '.join(source.names)} holds no images to index")
    seconds = time.perf_counter() - started
    return IndexReport(
        indexed=run.indexed,
        already_present=run.present,
        num_skipped=run.num_skipped,
        skipped=tuple(run.skipped),
        num_ignored=source.num_ignored,
        num_links=source.num_links,
        seconds=seconds,
        images_per_s=run.indexed / seconds,
        encoder=encoder,
    )


def _check_only(source: Source[Any], only: frozenset[str] | None) -> None:
    """Refuse ids that the source lacks, and a list of none, before any work."""
    if only is None:
        return
    if not only:
        raise RequestError(
            "the list of ids to index (only) is empty, expected at least one id",
            hint="leave only (--only, --from) out to index everything",
        )
    lacking = sorted(only.difference(source.ids()))
    if lacking:
        found = f"{len(lacking)} of {len(only)} ids"
        raise RequestError(
            f"{found} are not in {' '.join(sorted(source.names))}: {named(lacking)}",
            hint="an id is the path below the folder, the name in the list, or the tar's member",
        )


def _open_store(folder: Path, manifest: BundleManifest, dtype: str | None) -> TokenStore:
    """Open the store to append; make it if nothing is there; refuse another encoder's or dtype."""
    sizes, fingerprint = manifest.sizes, manifest.fingerprint_encoder
    if is_free(folder):
        return TokenStore.create(
            folder,
            num_tokens=sizes.num_tokens,
            hidden=sizes.hidden,
            fingerprint_encoder=fingerprint,
            dtype=dtype or DEFAULT_DTYPE,
        )
    with ExitStack() as undo:
        store = undo.enter_context(TokenStore.open(folder, mode="a"))
        if store.fingerprint_encoder != fingerprint:
            raise StoreError(
                f"the store {folder} was made by another image encoder",
                faults=[f"store: {store.fingerprint_encoder}", f"this encoder: {fingerprint}"],
                hint="tokens of two encoders do not compare: index the same images into a new "
                f"store, edje store ids {folder} > ids.txt && "
                "edje index ENGINE_OR_BUNDLE IMAGES --into NEW_STORE --from ids.txt",
            )
        if dtype not in (None, store.layout.dtype):
            raise StoreError(
                f"the store {folder} holds {store.layout.dtype} tokens, asked for were {dtype}",
                hint="leave --dtype out, or index into a new store",
            )
        undo.pop_all()
    return store
