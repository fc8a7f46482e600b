"""The flow of an index run: read -> decode -> encode -> append, all four at once, in order."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from ...arguments import Progress, StrPath
from ...arrays import Float16
from ...files import Closing, rewrite_file, sync_folder
from ..store import TokenStore
from ..store.format import id_fault
from .decoders import Decoded, DecoderPool
from .features import FeatureEntry
from .images import Unreadable
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
        ids, sources: of the inputs.
        inputs: RGB uint8 [n, R, R, 3] or features [n, N, D], host; None where n is 0.
    """

    ids: list[str]
    sources: list[str]
    inputs: npt.NDArray[Any] | None
    skipped: list[SkippedImage]


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


SKIPPED = "skipped.jsonl"


class SkippedLog(Closing):
    """Lines `{"id", "reason", "source"}`, appended as a run goes and put in order at its end.

    A kill leaves the lines of that run behind those of earlier ones; the next run replaces them.
    """

    def __init__(self, store: Path):
        self._path = store / SKIPPED
        for draft in store.glob(f".{SKIPPED}.*"):  # of a run that was killed
            draft.unlink()
        self._file = self._path.open("a+b")
        self._mend_tail()
        self._start = self._file.tell()

    def add(self, skipped: SkippedImage) -> None:
        """Append one line."""
        line = json.dumps(skipped.as_text()._asdict(), ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def finish(self, is_stale: Callable[[SkippedImage], bool]) -> None:
        """Rewrite the file: the lines of this run, and the older ones that are not stale.

        A kill in between leaves the file as it was. Without a line there is no file.
        """
        seen: set[str] = set()
        with rewrite_file(self._path) as file:
            for line, is_new in self._lines():
                entry = _parsed(line)
                if entry is None or entry.id in seen or (not is_new and is_stale(entry)):
                    continue
                seen.add(entry.id)
                file.write(line + b"\n")
        if not seen:
            self._path.unlink()
            sync_folder(self._path.parent)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _lines(self) -> Iterator[tuple[bytes, bool]]:
        """Yield every line, and whether this run wrote it: these first."""
        with self._path.open("rb") as file:
            file.seek(self._start)
            for line in file:
                yield line.rstrip(b"\n"), True
            file.seek(0)
            left = self._start
            for line in file:
                left -= len(line)
                if left < 0:
                    return
                yield line.rstrip(b"\n"), False

    def _mend_tail(self) -> None:
        """End a line that a kill has torn."""
        end = self._file.seek(0, os.SEEK_END)
        if end and os.pread(self._file.fileno(), 1, end - 1) != b"\n":
            self._file.write(b"\n")
            self._file.flush()


def read_skipped(store: StrPath) -> list[SkippedImage]:
    """Return what `STORE/skipped.jsonl` holds, a new list; empty where there is no such file."""
    path = Path(store) / SKIPPED
    if not path.exists():
        return []
    entries = (_parsed(line) for line in path.read_bytes().split(b"\n") if line)
    return [entry for entry in entries if entry is not None]


def _parsed(line: bytes) -> SkippedImage | None:
    """Return a line's entry, None for one that is torn or not ours."""
    try:
        values = json.loads(line)
        return SkippedImage(values["id"], values["reason"], values["source"])
    except (ValueError, KeyError, TypeError):
        return None


class Run:
    """An index run: which ids it takes, how far it is, and what gave no record.

    Attributes:
        store: open to append.
        indexed: records that this run has added.
        present: ids that the store held before.
        num_skipped: entries without a record; `skipped` holds the first of them.
    """

    def __init__(
        self,
        store: TokenStore,
        source: Source[Any],
        log: SkippedLog,
        only: Collection[str] | None,
        progress: Progress | None,
        on_skip: OnSkip | None,
    ):
        """Begin, and count what there is where that is cheap.

        Args:
            only: the ids to take, None for all.
            log: gets every skipped entry, and so does `on_skip`.
            progress: called with (done, total) now and whenever something is durable.
        """
        self.store = store
        self.indexed = self.present = self.num_skipped = 0
        self.skipped: list[SkippedImage] = []
        self._source, self._log, self._only = source, log, only
        self._progress, self._on_skip = progress, on_skip
        self._num_met = 0  # the reading thread counts it, and `present`; the caller's all else
        self._total: int | None = None
        if source.countable:
            self._total = 0
            for image_id in source.ids():
                if only is None or image_id in only:
                    self._total += 1
                    self.present += image_id in store
        self._show()

    @property
    def num_done(self) -> int:
        """Entries that need nothing more."""
        return self.present + self.indexed + self.num_skipped

    def wants(self, image_id: str) -> bool:
        """Return whether to read an entry: it was asked for, and the store lacks it."""
        if self._only is not None and image_id not in self._only:
            return False
        self._num_met += 1
        if image_id not in self.store:
            return True
        self.present += self._total is None
        return False

    def add(self, num_records: int, skipped: Sequence[SkippedImage]) -> None:
        """Count records that are durable now, and note what gave none."""
        skipped = [entry.as_text() for entry in skipped]
        self.indexed += num_records
        self.num_skipped += len(skipped)
        self.skipped += skipped[: MAX_NAMED - len(self.skipped)]
        for entry in skipped:
            self._log.add(entry)
            if self._on_skip:
                self._on_skip(entry)
        self._show()

    def finish(self) -> None:
        """Drop the lines of earlier runs that are not true any more from the log."""
        names = self._source.names if self._only is None else ()
        self._log.finish(lambda old: old.id in self.store or old.source in names)

    def _show(self) -> None:
        if self._progress:
            total = self._source.estimate(self._num_met) if self._total is None else self._total
            self._progress(self.num_done, max(self.num_done, total))


def index_batches(run: Run, encode: Encode, batches: Iterator[Batch]) -> None:
    """Encode every batch and have a thread append it; what `run` has counted is durable."""
    appends: deque[tuple[Future[None], int, list[SkippedImage]]] = deque()

    def append(ids: list[str], tokens: Float16 | None) -> None:
        if tokens is not None and ids:
            run.store.append(ids, tokens)

    def finish_oldest() -> None:
        future, num_records, skipped = appends.popleft()
        future.result()
        run.add(num_records, skipped)

    with (
        ThreadPoolExecutor(1, thread_name_prefix="edje-append") as appender,
        closing(read_ahead(batches, NUM_AHEAD)) as ahead,
    ):
        for batch in ahead:
            ids, tokens, skipped = encode_batch(encode, batch)
            appends.append((appender.submit(append, ids, tokens), len(ids), skipped))
            if len(appends) > NUM_APPENDS:
                finish_oldest()
        while appends:
            finish_oldest()
