"""`edje index`: images -> image encoder -> token store. Run again, it continues."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..bundle import BundleManifest, ImageSpec
from ..errors import RequestError, StoreError, named
from .image_encoder import ImageEncoder
from .images import Float32, Unreadable, decode_image, import_pillow
from .store import TokenStore
from .store.layout import is_id

Progress = Callable[[int, int], None]

DEFAULT_BATCH_SIZE = 32


class SkippedImage(NamedTuple):
    """A file that gave no record, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What `index_images` did.

    Attributes:
        indexed: records added by this call.
        already_present: ids that the store held before; they are not read again.
        skipped: files without a record.
        seconds: of this call.
        images_per_s: indexed / seconds.
        encoder: the library that ran the image encoder, with its version.
    """

    indexed: int
    already_present: int
    skipped: tuple[SkippedImage, ...]
    seconds: float
    images_per_s: float
    encoder: str


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image to index."""

    id: str
    path: Path


@dataclass(slots=True)
class _Tally:
    """Counts of a run so far."""

    indexed: int = 0
    skipped: list[SkippedImage] = field(default_factory=list)


def index_images(
    encoder: ImageEncoder,
    images: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: Progress | None = None,
) -> IndexReport:
    """Encode images and append their tokens to a store, which is made if there is none.

    Every batch is durable before the next one is encoded; ids that the store holds already are
    left out, so the same call continues after an interruption.

    Args:
        encoder: makes the tokens.
        images: a folder (an id is the path below it, with `/`) or a list file, one
            `id<TAB>path` a line, paths relative to the list file.
        store: folder of the store.
        batch_size: images a forward.
        progress: called with (done, total) after every batch.

    Returns:
        The report; files that are no readable image, or whose tokens are not finite, are in
        `skipped` with the reason.

    Raises:
        RequestError: nothing to index, a faulty list file (all lines named), no Pillow.
        StoreError: a store of another encoder, or one that cannot be written.
    """
    if batch_size < 1:
        raise RequestError(f"batch_size is {batch_size}, expected at least 1")
    import_pillow()
    started = time.perf_counter()
    files = list_images(Path(images), leave_out=Path(store))
    tally = _Tally()
    with _open_store(Path(store), encoder.manifest) as target:
        fresh = [file for file in files if file.id not in target]
        done = present = len(files) - len(fresh)
        if progress:
            progress(done, len(files))
        batches = [fresh[at : at + batch_size] for at in range(0, len(fresh), batch_size)]
        for batch, decoded in _decode_ahead(batches, encoder.image):
            _add_batch(encoder, target, batch, decoded, tally)
            done += len(batch)
            if progress:
                progress(done, len(files))
    seconds = time.perf_counter() - started
    rate = tally.indexed / seconds
    skipped = tuple(tally.skipped)
    return IndexReport(tally.indexed, present, skipped, seconds, rate, encoder.name)


def list_images(images: Path, *, leave_out: Path | None = None) -> list[ImageFile]:
    """Return the files of a folder, sorted by id, or the entries of a list file, in its order.

    Args:
        images: folder or list file.
        leave_out: a folder below `images` whose files do not count (the store itself).

    Raises:
        RequestError: missing, empty, or a faulty list file (all faults at once).
    """
    if images.is_dir():
        files = sorted(_walk(images, leave_out), key=lambda file: file.id)
    elif images.is_file():
        files = _read_list(images)
    else:
        raise RequestError(
            f"there is no {images}", hint="give a folder of images, or a list of `id<TAB>path`"
        )
    if not files:
        raise RequestError(f"{images} holds no files to index")
    return files


def _walk(root: Path, leave_out: Path | None) -> Iterator[ImageFile]:
    hidden = leave_out.resolve() if leave_out else None
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if (here / name).resolve() != hidden]
        for name in names:
            yield ImageFile((here / name).relative_to(root).as_posix(), here / name)


def _read_list(path: Path) -> list[ImageFile]:
    try:
        lines = [line.rstrip("\r") for line in path.read_text(encoding="utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not a list of images: it is no UTF-8 text ({error.reason})",
            hint="give a folder of images, or a text file with one `id<TAB>path` a line",
        ) from error
    entries = [(number, *line.partition("\t")) for number, line in enumerate(lines, 1) if line]
    faults = [
        f"line {number}: got {(image_id + tab + where)[:80]!r}, expected `id<TAB>path`"
        for number, image_id, tab, where in entries
        if not (image_id and where)
    ]
    ids = [image_id for _, image_id, _, _ in entries]
    seen: set[str] = set()
    twice = [i for i in ids if i in seen or seen.add(i)]  # type: ignore[func-returns-value]
    if twice:
        faults.append(f"{len(twice)} ids come twice: {named(twice)}")
    if faults:
        rest = [f"and {len(faults) - 20} more faults"] if len(faults) > 20 else []
        raise RequestError(f"{path} is not a list of images", faults=faults[:20] + rest)
    return [ImageFile(image_id, path.parent / where) for _, image_id, _, where in entries]


def _open_store(folder: Path, manifest: BundleManifest) -> TokenStore:
    """Open the store to append; make it if nothing is there; refuse another encoder's."""
    sizes, fingerprint = manifest.sizes, manifest.fingerprint_encoder
    if not folder.exists():
        return TokenStore.create(
            folder,
            num_tokens=sizes.num_tokens,
            hidden=sizes.hidden,
            fingerprint_encoder=fingerprint,
        )
    store = TokenStore.open(folder, mode="a")
    if store.fingerprint_encoder == fingerprint:
        return store
    store.close()
    raise StoreError(
        f"the store {folder} was made by another image encoder",
        faults=[f"store: {store.fingerprint_encoder}", f"this encoder: {fingerprint}"],
        hint="index into a new store: tokens of two encoders do not compare",
    )


def _decode_ahead(
    batches: Sequence[list[ImageFile]], spec: ImageSpec
) -> Iterator[tuple[list[ImageFile], list[Float32 | Unreadable]]]:
    """Yield every batch decoded; a thread decodes the next one while the caller works."""

    def decode(batch: list[ImageFile]) -> list[Float32 | Unreadable]:
        return [_decode(file, spec) for file in batch]

    # One thread: the encoder takes all cores, and Pillow decodes far faster than it encodes.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="edje-decode") as pool:
        ahead: deque[tuple[list[ImageFile], Future[list[Float32 | Unreadable]]]] = deque()
        for batch in batches:
            ahead.append((batch, pool.submit(decode, batch)))
            if len(ahead) > 1:
                current, decoded = ahead.popleft()
                yield current, decoded.result()
        for current, decoded in ahead:
            yield current, decoded.result()


def _decode(file: ImageFile, spec: ImageSpec) -> Float32 | Unreadable:
    if not is_id(file.id):  # the operating system allows any bytes in a name
        return Unreadable("its name is not UTF-8, so it cannot be an id")
    return decode_image(file.path, spec)


def _add_batch(
    encoder: ImageEncoder,
    store: TokenStore,
    batch: list[ImageFile],
    decoded: list[Float32 | Unreadable],
    tally: _Tally,
) -> None:
    """Encode what could be decoded, append what is finite, note the rest."""
    pixels, ids = [], []
    for file, image in zip(batch, decoded, strict=True):
        if isinstance(image, Unreadable):
            shown = file.id.encode(errors="backslashreplace").decode()
            tally.skipped.append(SkippedImage(shown, image.reason))
        else:
            pixels.append(image)
            ids.append(file.id)
    if not pixels:
        return
    tokens = encoder.encode(np.stack(pixels))
    finite = np.asarray(np.isfinite(tokens).all(axis=(1, 2)))
    tally.skipped += [
        SkippedImage(image_id, "its tokens hold NaN or infinity")
        for image_id, good in zip(ids, finite, strict=True)
        if not good
    ]
    kept = [image_id for image_id, good in zip(ids, finite, strict=True) if good]
    store.append(kept, tokens[finite])
    tally.indexed += len(kept)
