"""The flow of an index run: read -> decode -> encode -> append, all four at once, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ...arrays import Float16
from ..store import TokenStore
from ..store.format import id_fault
from .decoders import Decoded, DecoderPool
from .features import FeatureEntry
from .images import Unreadable
from .skipped import SkippedLog
from .sources import ImageFile, SkippedImage, Source

Encode = Callable[[npt.NDArray[Any]], Float16]
OnSkip = Callable[[SkippedImage], None]

DEFAULT_BATCH_SIZE = 32  # images a forward
MAX_NAMED = 1000  # skipped entries that a run remembers; the log has them all
MAX_GROUP_BYTES = 1 << 26  # of compressed tars' members, which travel to the decoders
NUM_AHEAD = 2  # batches read and decoded that wait for the encoder
NUM_APPENDS = 2  # batches encoded that wait for the disk

Entry = TypeVar("Entry", ImageFile, FeatureEntry)
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Group(Generic[Entry]):
    """Entries of one forward, and what the source skipped between them."""

    entries: list[Entry]
    skipped: list[SkippedImage]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward takes, and what gave no input on the way.

    Attributes:
        ids: of the inputs.
        sources: where each comes from.
        inputs: RGB uint8 [n, R, R, 3] or features [n, N, D], host; None where n is 0.
        skipped: with the reasons.
    """

    ids: list[str]
    sources: list[str]
    inputs: npt.NDArray[Any] | None
    skipped: list[SkippedImage]


@dataclass(slots=True)
class Tally:
    """How far a run is. The reading thread counts `met` and `present`, the caller's the rest."""

    total: int | None = None
    met: int = 0
    present: int = 0
    indexed: int = 0
    num_skipped: int = 0
    skipped: list[SkippedImage] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Entries that need nothing more."""
        return self.present + self.indexed + self.num_skipped


class Selection:
    """Which ids of a source a run takes: those of `only` (None: all) that the store lacks."""

    def __init__(self, store: TokenStore, only: Collection[str] | None, tally: Tally):
        self._store, self._only, self._tally = store, only, tally

    def __call__(self, image_id: str) -> bool:
        if self._only is not None and image_id not in self._only:
            return False
        self._tally.met += 1
        if not self.has(image_id):
            return True
        self._tally.present += self._tally.total is None
        return False

    def has(self, image_id: str) -> bool:
        """Whether the store holds it."""
        return image_id in self._store

    def survey(self, source: Source[Any]) -> None:
        """Count what there is and what the store holds of it, where that is cheap."""
        if not source.countable:
            return
        total = present = 0
        for image_id in source.ids():
            if self._only is None or image_id in self._only:
                total += 1
                present += self.has(image_id)
        self._tally.total, self._tally.present = total, present


def groups(entries: Iterable[Entry | SkippedImage], size: int) -> Iterator[Group[Entry]]:
    """Yield what a source gives in groups of `size` entries, fewer where they are large."""
    group: Group[Entry] = Group([], [])
    num_bytes = 0
    for entry in entries:
        if isinstance(entry, SkippedImage):
            group.skipped.append(entry)
        elif fault := id_fault(entry.id):  # the operating system allows any bytes in a name
            reason = f"its name cannot be an id: it {fault}"
            group.skipped.append(SkippedImage(entry.id, reason, entry.source))
        else:
            group.entries.append(entry)
            num_bytes += entry.carried_bytes
        if len(group.entries) + len(group.skipped) >= size or num_bytes >= MAX_GROUP_BYTES:
            yield group
            group, num_bytes = Group([], []), 0
    if group.entries or group.skipped:
        yield group


def decoded_batches(pool: DecoderPool, files: Iterator[Group[ImageFile]]) -> Iterator[Batch]:
    """Yield the groups decoded, in order; one more than there are workers are under way."""
    ahead: deque[tuple[Group[ImageFile], Future[list[Decoded]]]] = deque()
    for group in files:
        ahead.append((group, pool.submit(group.entries)))
        if len(ahead) > pool.num_workers:
            yield _decoded(*ahead.popleft())
    while ahead:
        yield _decoded(*ahead.popleft())


def _decoded(group: Group[ImageFile], result: Future[list[Decoded]]) -> Batch:
    files, images, skipped = [], [], group.skipped
    for file, image in zip(group.entries, result.result(), strict=True):
        if isinstance(image, Unreadable):
            skipped.append(SkippedImage(file.id, image.reason, file.source))
        else:
            files.append(file)
            images.append(image)
    return _batch(files, images, skipped)


def _batch(
    entries: Sequence[ImageFile | FeatureEntry],
    inputs: Sequence[npt.NDArray[Any]],
    skipped: list[SkippedImage],
) -> Batch:
    ids, sources = [entry.id for entry in entries], [entry.source for entry in entries]
    return Batch(ids, sources, np.stack(inputs) if inputs else None, skipped)


def feature_batches(entries: Iterator[Group[FeatureEntry]]) -> Iterator[Batch]:
    """Yield the groups of features, one batch for every shape and dtype in a group."""
    for group in entries:
        kinds: dict[tuple[Any, ...], list[FeatureEntry]] = {}
        for entry in group.entries:
            kinds.setdefault((entry.features.shape, entry.features.dtype), []).append(entry)
        skipped = group.skipped
        for alike in kinds.values():
            yield _batch(alike, [entry.features for entry in alike], skipped)
            skipped = []
        if skipped:
            yield _batch([], [], skipped)


def encode_batch(
    encode: Encode, batch: Batch
) -> tuple[list[str], Float16 | None, list[SkippedImage]]:
    """Return ids and tokens float16 [n, m, H] (None: no input), and all that was skipped.

    An image whose tokens are not finite is skipped.
    """
    if batch.inputs is None:
        return [], None, batch.skipped
    tokens = encode(batch.inputs)
    finite = np.asarray(np.isfinite(tokens).all(axis=(1, 2)))
    named = list(zip(batch.ids, batch.sources, finite, strict=True))
    reason = "its tokens hold NaN or infinity"
    bad = [SkippedImage(image_id, reason, source) for image_id, source, good in named if not good]
    kept = [image_id for image_id, _, good in named if good]
    return kept, tokens[finite] if bad else tokens, batch.skipped + bad


def read_ahead(items: Iterator[Item], depth: int) -> Generator[Item, None, None]:
    """Yield `items`; a thread works on the next `depth` of them while the caller has one."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="edje-read") as reader:
        ahead = deque(reader.submit(next, items, end) for _ in range(depth))
        try:
            while (item := ahead.popleft().result()) is not end:
                ahead.append(reader.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            reader.shutdown(cancel_futures=True)


class Run:
    """The store that an index run fills, and its books.

    Args:
        store: open to append.
        selection: which ids the run takes.
        log: gets every skipped entry.
        tally: its counts.
        report: called when something is durable, and on_skip with every skipped entry.
    """

    def __init__(
        self,
        store: TokenStore,
        selection: Selection,
        log: SkippedLog,
        tally: Tally,
        report: Callable[[], None],
        on_skip: OnSkip | None,
    ):
        self.store, self.selection = store, selection
        self._log, self._tally, self._report, self._on_skip = log, tally, report, on_skip

    def settle(self, num_records: int, skipped: Sequence[SkippedImage]) -> None:
        """Count records that are durable now, and note what gave none."""
        skipped = [entry.as_text() for entry in skipped]
        self._tally.indexed += num_records
        self._tally.num_skipped += len(skipped)
        self._tally.skipped += skipped[: MAX_NAMED - len(self._tally.skipped)]
        for entry in skipped:
            self._log.add(entry)
            if self._on_skip:
                self._on_skip(entry)
        self._report()


class Flow:
    """Encodes batches and has a thread append them.

    Args:
        run: where they go.
        encode: inputs -> tokens.
    """

    def __init__(self, run: Run, encode: Encode):
        self._run, self._encode = run, encode
        self._appends: deque[tuple[Future[None], int, list[SkippedImage]]] = deque()

    def take(self, batches: Iterator[Batch]) -> None:
        """Take every batch to the store. When it raises, what was appended is durable."""
        with (
            ThreadPoolExecutor(1, thread_name_prefix="edje-append") as appender,
            closing(read_ahead(batches, NUM_AHEAD)) as ahead,
        ):
            for batch in ahead:
                ids, tokens, skipped = encode_batch(self._encode, batch)
                future = appender.submit(self._append, ids, tokens)
                self._appends.append((future, len(ids), skipped))
                if len(self._appends) > NUM_APPENDS:
                    self._settle()
            while self._appends:
                self._settle()

    def _append(self, ids: list[str], tokens: Float16 | None) -> None:
        if tokens is not None and ids:
            self._run.store.append(ids, tokens)

    def _settle(self) -> None:
        """Wait until the oldest batch is durable, and count it."""
        future, num_records, skipped = self._appends.popleft()
        future.result()
        self._run.settle(num_records, skipped)
